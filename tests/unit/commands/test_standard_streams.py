"""A full disk under the log of a command: runs go on, and what has its result on stdout says that it is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lpr.commands.standard_streams import LossyStream, lossy_streams

ROOT = Path(__file__).resolve().parents[3]
FULL = "/dev/full"
CODE = """
import sys
from megatron_lpr.commands.exit_status import status_of
def command():
    for number in range({lines}):
        print("line", number, flush=number % 2 == 0)
        print("remark", number, file=sys.stderr)
    open({done!r}, "w").write("done")
    return 0
sys.exit(status_of("x", command, resumes={resumes}))
"""

pytestmark = pytest.mark.skipif(not os.path.exists(FULL), reason=f"no {FULL}")


def run(done: Path, *, resumes: bool, lines: int = 3000, **streams) -> subprocess.CompletedProcess:
    code = CODE.format(lines=lines, done=str(done), resumes=resumes)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, **streams)


@pytest.mark.parametrize("lines", [1, 3000])  # within Python's buffer, and beyond it
def test_a_run_goes_on_without_its_log(tmp_path, lines):
    with open(FULL, "w") as full:
        result = run(tmp_path / "done", resumes=True, lines=lines, stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, (tmp_path / "done").read_text()) == (0, "done")
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr
    with open(FULL, "w") as full:
        assert run(tmp_path / "again", resumes=True, lines=lines, stdout=full, stderr=full).returncode == 0
    assert (tmp_path / "again").read_text() == "done"


def test_a_result_that_is_lost_is_told(tmp_path):
    with open(FULL, "w") as full:
        result = run(tmp_path / "done", resumes=False, lines=1, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr == b"remark 0\nx: what it prints could not be written: No space left on device\n"
    assert (tmp_path / "done").exists()


def test_remarks_that_are_lost_are_no_failure(tmp_path):
    with open(FULL, "w") as full:
        result = run(tmp_path / "done", resumes=False, stdout=subprocess.PIPE, stderr=full)
    assert result.returncode == 0 and result.stdout.count(b"\n") == 3000


def test_a_closed_stdout(tmp_path):
    """As of `megatron-lpr train ... >&-`: nothing that is opened later becomes what others print to."""
    code = CODE.format(lines=3, done=str(tmp_path / "done"), resumes=False)
    shell = ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code]
    result = subprocess.run(shell, cwd=ROOT, stderr=subprocess.PIPE, timeout=60)
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    assert (tmp_path / "done").read_text() == "done"


def test_the_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with lossy_streams() as (stdout, stderr):
        assert (sys.stdout, sys.stderr) == (stdout, stderr)
        assert isinstance(sys.stdout, LossyStream) and sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before


def test_characters_that_the_locale_has_not(tmp_path):
    """A Slurm log under LANG=hu_HU or an ASCII stdout ends no run that names a Greek folder."""
    code = (
        "from megatron_lpr.commands.exit_status import status_of\nstatus_of('x', lambda: print('\u0151\u03b1') or 0)\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "iso8859-2"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"\xf5\\u03b1\n", b"")
