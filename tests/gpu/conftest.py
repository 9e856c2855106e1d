"""What the tests of a GPU begin with."""

import pytest
from layouts import write_source


@pytest.fixture
def source(megatron, toy_base, tmp_path):
    """A checkpoint in which every expert has weights of its own; its layout is left."""
    from megatron_lpr.platform import leave_layout

    folder = write_source(toy_base, tmp_path / "source")
    leave_layout()
    return folder
