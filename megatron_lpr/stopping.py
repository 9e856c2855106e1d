"""How a command ends that is stopped from outside: one sentence and the exit status that shells know."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator

INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE


def status_of(name: str, command: Callable[[], int]) -> int:
    """The exit status of `command`, also where Ctrl-C stops it or nobody reads what it prints any more."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:
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


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """Processes that are started inside never get Ctrl-C, which a terminal sends to all: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
