"""What a forked command leaves behind."""

import subprocess
import sys

# As in a container whose first process reaps nobody: this one gets the orphans, and leaves them zombies.
SCRIPT = """
import ctypes, os, sys
from pathlib import Path
from megatron_lpr.testing import forked_commands

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
forked_commands._GRACE_SECONDS = float(sys.argv[2])

def command():
    if not os.fork():
        ctypes.CDLL(None).sleep(int(sys.argv[3]))
        os._exit(0)
    return 0

print(forked_commands.ForkedCommand(command, Path(sys.argv[1])).wait(60).orphans)
"""


def orphans(log, grace, seconds):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(log), str(grace), str(seconds)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_goes_on_is_left_behind_and_what_has_ended_is_not(tmp_path):
    assert "pid=" in orphans(tmp_path / "log", grace=0.1, seconds=300)
    assert orphans(tmp_path / "log", grace=60, seconds=0) == "()\n"
