"""Ctrl-C and the processes that a command starts."""

import signal
import subprocess
import sys

from megatron_lpr.platform.stopping import not_for_children


def test_processes_that_share_the_work_are_not_reached():
    show = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with not_for_children():
        assert subprocess.check_output([sys.executable, "-c", show], text=True) == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
