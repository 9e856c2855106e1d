"""A fault of each kind, as benchmarks/faults.py injects a thousand of them."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks/faults.py"


@pytest.mark.slow
def test_nothing_is_lost_or_other_or_left_behind(tmp_path):
    command = [sys.executable, BENCHMARK, "--quick", "--keep", tmp_path / "printed"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = [f"{file.name}\n{file.read_text()}" for file in tmp_path.glob("printed/*")]
    assert done.returncode == 0, "\n".join([done.stdout, *printed])
