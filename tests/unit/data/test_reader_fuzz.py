"""`make fuzz` in small: the C++ sampler on corrupt files, under AddressSanitizer and UBSan."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="needs make and g++")
def test_corrupt_corpora_never_crash_the_sampler():
    run = subprocess.run(["make", "fuzz", "FUZZ_RUNS=2000"], cwd=ROOT, capture_output=True, text=True)
    if "cannot find -lasan" in run.stderr or "cannot find -lubsan" in run.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert run.returncode == 0, run.stderr
    assert "2000 corrupt corpora" in run.stdout and "no crash" in run.stdout
