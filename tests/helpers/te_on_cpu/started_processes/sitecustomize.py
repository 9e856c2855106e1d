"""Read by every Python that a test starts: the ranks of a test have the same Transformer Engine as the test itself."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from te_on_cpu import install_on_import  # noqa: E402

install_on_import()
