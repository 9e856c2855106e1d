"""What the tests of pictures look at."""

import pytest
from matplotlib.figure import Figure

from megatron_lpr.reporting import gain_plot, plots


@pytest.fixture
def figures(monkeypatch):
    """The figures in the order in which they were made."""
    made = []

    class Recorded(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    for module in (gain_plot, plots):
        monkeypatch.setattr(module, "Figure", Recorded)
    return made
