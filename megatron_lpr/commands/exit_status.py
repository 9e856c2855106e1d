"""How a command ends that is stopped from outside: one sentence and the exit status that shells know.

It imports nothing heavy: it must be in place before what takes seconds to import.
"""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable

INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE


def status_of(name: str, command: Callable[[], int]) -> int:
    """The exit status of `command`, also where Ctrl-C stops it or nobody reads what it prints any more."""
    interrupted = []

    def note(*signal_and_frame) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    takes_it = signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread()
    if takes_it:
        signal.signal(signal.SIGINT, note)
    try:
        status = command()
        sys.stdout.flush()
        return status
    except (KeyboardInterrupt, Exception) as error:
        # libraries that are being imported may turn the one into the other
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            if isinstance(error, BrokenPipeError):
                return _nobody_reads(name)
            raise
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        if _in_process_group():  # the end of Python would wait for a collective that nobody finishes
            os._exit(INTERRUPTED)
        return INTERRUPTED
    finally:
        if takes_it:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _nobody_reads(name: str) -> int:
    _drop_output()
    with contextlib.suppress(BrokenPipeError):
        print(f"{name}: stopped, for nobody reads what it prints", file=sys.stderr, flush=True)
    return NOBODY_READS


def _drop_output() -> None:
    """Or Python would try to print the rest when it ends, and complain."""
    with contextlib.suppress(io.UnsupportedOperation):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
