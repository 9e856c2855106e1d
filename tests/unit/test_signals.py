"""What asks a command to stop: at once or at a step, a second time, in a child, and at torchrun's death."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lpr.errors import Stopped
from megatron_lpr.signals import SIGNALS, Interrupted, listener, listening, not_for_children, stoppable

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import os, signal, subprocess, sys, time
from megatron_lpr.commands.exit_status import status_of
from megatron_lpr.errors import Stopped
from megatron_lpr.signals import listener

def command():
    {code}

{before}

status = status_of("x", command, resumes={resumes}, ends=True)
sys.exit(status)
"""
READY = "print('ready', flush=True)"
SLEEP = f"{READY}; time.sleep(60)"
A_STEP = f"""
    asked = []
    listener().stop_at_a_step(lambda: asked.append(1))
    {READY}
    while not asked: time.sleep(0.01)
"""
# as in a collective: the interpreter handles no signal
NO_INTERPRETER = f"""
    import ctypes
    listener().stop_at_a_step(lambda: None)
    {READY}
    for _ in range(20): ctypes.CDLL(None).sleep(60)
"""


def start(code, resumes=False, before="", **environment):
    """A command, once it is ready; `before` comes before it listens."""
    script = COMMAND.format(code=code, resumes=resumes, before=before)
    process = subprocess.Popen(
        # from Python 3.12 on a fork beside numpy's threads is warned of
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    _, error = process.communicate(timeout=30)
    return process.returncode, error


def ended_by_a_second(process, signum):
    """Sent until it ends: what comes soon after the first was heard is its echo, and a busy machine hears late."""
    for _ in range(60):
        time.sleep(0.5)
        if process.poll() is not None:
            break
        process.send_signal(signum)
    return ended(process)


@pytest.mark.parametrize(
    "signum, status, sentence",
    [
        (signal.SIGTERM, 143, "x: ended by SIGTERM\n"),
        (signal.SIGUSR1, 138, "x: ended by SIGUSR1\n"),
        (signal.SIGINT, 130, "x: interrupted\n"),
    ],
)
def test_a_command_ends_at_once(signum, status, sentence):
    process = start(SLEEP)
    process.send_signal(signum)
    assert ended(process) == (status, sentence)


@pytest.mark.parametrize("signum", SIGNALS)
def test_what_goes_on_when_it_is_started_again_has_not_failed(signum):
    process = start(SLEEP, resumes=True)
    process.send_signal(signum)
    sentence = f"x: stopped by {signum.name} before its first step, so that there is nothing to save; "
    assert ended(process) == (75, f"{sentence}the same command starts it again\n")


def test_a_rank_that_waits_for_others_before_its_first_step_has_not_failed():
    """In C, where the interpreter is not asked: here for a mutex that is held, else for a rank that never comes."""
    wait = f"import ctypes; lock = (ctypes.c_byte * 64)(); {READY}"
    held = "; [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"
    process = start(wait + held, resumes=True, WORLD_SIZE="2")
    time.sleep(0.5)  # until it waits
    process.send_signal(signal.SIGTERM)
    status, error = ended(process)
    assert status == 75 and error.startswith("x: stopped by SIGTERM before its first step")


def test_a_run_is_asked_once_and_twice_in_a_blink_is_once():
    a_blink = "import megatron_lpr.signals; megatron_lpr.signals._ECHO_SECONDS = 20.0"  # of a busy machine
    process = start(A_STEP + "\n    time.sleep(0.5)\n    raise Stopped", before=a_blink)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (75, "")


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_second_signal_when_all_is_saved_ends_at_once_and_is_no_failure(signum):
    process = start(f"listener().has_stopped()\n    {NO_INTERPRETER.lstrip()}", resumes=True)
    process.send_signal(signal.SIGTERM)
    assert ended_by_a_second(process, signum) == (75, "")


@pytest.mark.parametrize("code", [A_STEP + "\n    raise Stopped", SLEEP], ids=["a step", "the start-up"])
def test_a_signal_that_comes_while_python_ends_changes_nothing(code):
    """A second Ctrl-C when all is saved: a script starts it again for 75, not for that."""
    slow_end = "sys.exit = lambda status, end=sys.exit: (print('ends', flush=True), time.sleep(3), end(status))"
    process = start(f"{slow_end}\n    {code.lstrip()}", resumes=True)
    process.send_signal(signal.SIGINT)
    process.stdout.readline()  # nothing where it is gone already
    time.sleep(0.5)  # no echo of the first
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 75


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_what_handles_none(signum, status):
    process = start(NO_INTERPRETER)
    process.send_signal(signal.SIGUSR1)
    assert ended_by_a_second(process, signum) == (status, f"x: ended at once by a second signal, {signum.name}\n")


def test_an_error_after_the_question_is_still_an_error():
    process = start(A_STEP + "\n    raise ValueError('a bug')")
    process.send_signal(signal.SIGTERM)
    status, error = ended(process)
    assert status == 1 and error.endswith("ValueError: a bug\n")


@pytest.mark.parametrize(("signum", "ended_by"), [("SIGUSR1", 0), ("SIGINT", 0), ("SIGTERM", signal.SIGTERM)])
def test_a_forked_process_leaves_to_its_parent_what_a_group_gets(signum, ended_by):
    """But to be ended by its parent, which goes on."""
    code = f"""
    asked = []
    listener().stop_at_a_step(lambda: asked.append(1))
    (there, says), (go, ends) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(says, b"there")
        os.close(ends)
        os.read(go, 1)
        os._exit(0)
    os.read(there, 5)
    for _ in range(2):
        os.kill(child, signal.{signum})
        time.sleep(0.6)  # what comes sooner is the echo of the first
    os.close(ends)
    status = os.waitpid(child, 0)[1]
    {READY}
    return 100 * len(asked) + status
"""
    assert ended(start(code)) == (ended_by, "")


def test_a_daemon_that_a_hook_has_forked_does_not_hold_the_end():
    """Python terminates it, and waits for it."""
    code = f"""
    import multiprocessing
    there, says = os.pipe()
    def daemon():
        os.write(says, b"!")
        time.sleep(60)
    multiprocessing.get_context("fork").Process(target=daemon, daemon=True).start()
    os.read(there, 1)
    {READY}
    return 0
"""
    assert ended(start(code)) == (0, "")


def test_the_death_of_torchrun_is_a_signal():
    """SIGUSR1 ends it without a word to its ranks."""
    script = COMMAND.format(
        code=A_STEP + "\n    print(listener().what_asked(), flush=True)",
        resumes=True,
        before="",
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    # and the pipe is closed: the child has ended, if only to a zombie where a container's first process reaps none
    assert process.communicate(timeout=30)[0] == "the end of torchrun\n"
    assert process.returncode == -signal.SIGUSR1


def test_signals_mean_afterwards_what_they_meant_before():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with pytest.raises(Stopped) as stopped, stoppable("training"), stoppable("inside"):
        with listening("x") as mine:
            assert listener() is mine
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 75
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    with pytest.raises(Interrupted), listening("x"):
        signal.raise_signal(signal.SIGUSR1)


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with listening("x"):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_processes_that_share_the_work_are_not_reached():
    show = "import signal; print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    with not_for_children():
        blocked = subprocess.check_output([sys.executable, "-c", show], text=True).split()
    assert blocked == [str(int(signum)) for signum in sorted(SIGNALS)]
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])
