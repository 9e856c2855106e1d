"""When one rank dies, fails or is ended, all end within seconds, and rank 0 says why."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from megatron_lpr.testing.run_distributed import free_port

RANK = """
import ctypes, os, sys, time
from megatron_lpr.commands.exit_status import status_of
from megatron_lpr.errors import AlreadyTold, Stopped, UserError
from megatron_lpr.platform import Ranks, meeting
from megatron_lpr.platform.lifeline import connected, lifeline
from megatron_lpr.platform.meeting import meeting_store
from megatron_lpr.signals import listener

def report(error):
    print(error, file=sys.stderr)

def hang():  # as in a collective: the interpreter does nothing more
    print("ready", flush=True)
    for _ in range(20):
        ctypes.CDLL(None).sleep(60)

def command():
    ranks = Ranks.from_environment()
    try:
        with meeting(ranks.rank, 2, report), connected(ranks, meeting_store):
            {code}
    except AlreadyTold:
        return 2
    return 0

sys.exit(status_of("x", command, resumes=True))
"""


def test_a_rank_that_comes_when_rank_0_has_been_stopped_says_so():
    """As where SIGTERM ends rank 0 between their meeting and its lifeline: the store has gone with it."""
    import torch.distributed as dist

    from megatron_lpr.errors import UserError
    from megatron_lpr.platform import Ranks
    from megatron_lpr.platform.lifeline import connected

    port = free_port()
    stores = [
        dist.TCPStore("127.0.0.1", port, is_master=is_master, wait_for_workers=False) for is_master in (True, False)
    ]
    there = stores.pop()
    stores.clear()
    inside = connected(Ranks(rank=1, local_rank=1, world_size=2), lambda: there)
    with pytest.raises(UserError, match="rank 0 has ended before the ranks had agreed"), inside:
        raise AssertionError("it connected")


@dataclass(frozen=True)
class Case:
    """What each of two ranks does, which signals which rank gets when both are ready, and how they end.

    says: what each must have on its stderr; nothing: not a word.
    """

    code: tuple[str, str] = ("hang()", "hang()")
    to: int | None = None
    signals: tuple[int, ...] = ()
    status: tuple[int, int] = (1, 1)
    says: tuple[str, str] = ("", "")


STEPS = "listener().stop_at_a_step(lambda: None); hang()"
HAS_STOPPED = "listener().has_stopped(); "
LATER = "print('ready', flush=True); time.sleep(1); "
BEFORE_STEP = (
    "x: stopped by SIGTERM before its first step, so that there is nothing to save; the same command starts it"
)
# what a hook may have, which outlives the rank; after all have connected
FORKED = "time.sleep(2); os.fork() or (os.close(1), os.close(2), time.sleep(40), os._exit(0)); hang()"
CASES = {  # tests/e2e/test_stopping.py has more, of whole runs
    "rank 0 killed": Case(to=0, signals=(signal.SIGKILL,), status=(-9, 1), says=("", "rank 0 has died without a word")),
    "rank 0 killed, which has forked": Case(
        code=(FORKED, "hang()"),
        to=0,
        signals=(signal.SIGKILL,),
        status=(-9, 1),
        says=("", "rank 0 has died without a word"),
    ),
    "rank 1 killed, which has forked": Case(
        code=("hang()", FORKED),
        to=1,
        signals=(signal.SIGKILL,),
        status=(1, -9),
        says=("has died without a word, as by SIGKILL", ""),
    ),
    "a bug": Case(
        code=("hang()", f"{LATER}1 / 0"),
        says=("has failed: ZeroDivisionError: division by zero; its own output has the traceback", "Traceback"),
    ),
    "a bug, and what comes of it": Case(
        code=(
            f"{LATER}meeting_store().get('soon'); raise RuntimeError('[gloo] Connection closed by peer')",
            f"{LATER}meeting_store().set('soon', ''); time.sleep(0.5); 1 / 0",
        ),
        says=("has failed: ZeroDivisionError", "ZeroDivisionError"),
    ),
    "start-up of rank 0": Case(to=0, signals=(signal.SIGTERM,), status=(75, 75), says=(BEFORE_STEP, "")),
    "second": Case(
        code=("hang()", STEPS),
        to=1,
        signals=(signal.SIGUSR1, signal.SIGTERM),
        status=(143, 143),
        says=("rank 1: x: ended at once by a second signal, SIGTERM", "x: ended at once by a second signal, SIGTERM"),
    ),
    "second on rank 1, when all is saved": Case(
        code=(f"{HAS_STOPPED}{LATER}time.sleep(10); raise Stopped", f"{HAS_STOPPED}{STEPS}"),
        to=1,
        signals=(signal.SIGUSR1, signal.SIGTERM),
        status=(75, 75),
    ),
    "second on rank 0, when all is saved": Case(
        code=(f"{HAS_STOPPED}{STEPS}", f"{HAS_STOPPED}{LATER}time.sleep(10); raise Stopped"),
        to=0,
        signals=(signal.SIGUSR1, signal.SIGTERM),
        status=(75, 75),
    ),
    "a user's mistake": Case(
        code=("hang()", f"{LATER}raise UserError('wrong')"), status=(2, 2), says=("rank 1: error: wrong", "wrong")
    ),
}


@pytest.fixture(scope="module")
def outcomes():
    """Per case: (exit statuses, what was on stderr, seconds from the last signal to the end). All run at once."""
    with ExitStack() as stack:
        started = {name: [stack.enter_context(rank) for rank in start(case)] for name, case in CASES.items()}
        for ranks in started.values():
            for rank in ranks:
                assert rank.stdout.readline() == "ready\n", rank.stderr.read()
        found = {}
        for name, ranks in started.items():
            for signum in CASES[name].signals:
                ranks[CASES[name].to].send_signal(signum)
                time.sleep(0.5)
            since = time.monotonic()
            if len(CASES[name].signals) > 1:  # the second is an echo to a rank that has only just heard the first
                while ranks[CASES[name].to].poll() is None and time.monotonic() < since + 30:
                    time.sleep(0.5)
                    ranks[CASES[name].to].send_signal(signum)
            errors = [rank.communicate(timeout=60)[1] for rank in ranks]
            found[name] = tuple(rank.returncode for rank in ranks), errors, time.monotonic() - since
    return found


def start(case):
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            # Python 3.12 warns of os.fork where there are threads
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", RANK.format(code=case.code[rank])],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_how_two_ranks_end(outcomes, name):
    case, (status, errors, seconds) = CASES[name], outcomes[name]
    assert status == case.status, errors
    for rank in range(2):
        if case.says[rank]:
            assert case.says[rank] in errors[rank]
        else:
            assert errors[rank] == ""
        assert errors[rank].count("Traceback") == (case.says[rank] in ("Traceback", "ZeroDivisionError"))
    assert seconds < 30
