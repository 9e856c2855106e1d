"""Ctrl-C and the processes that a command starts."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """Processes that are started inside never get Ctrl-C, which a terminal sends to all: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
