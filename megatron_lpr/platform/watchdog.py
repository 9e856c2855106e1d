"""A thread that notices what takes too long, has all ranks write their stacks, and ends all of them.

It takes no lock that the main thread might hold, and waits for nothing longer than some seconds: not for the main
thread, not for a file system, not for another rank.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lpr.platform.lifeline import lifeline
from megatron_lpr.platform.stacks import within, write_stacks
from megatron_lpr.signals import end_process

_TICK_SECONDS = 0.5
_ASLEEP_SECONDS = 5.0  # between two ticks: the whole process was stopped, or its job was suspended
_OTHERS_SECONDS = 15.0  # that other ranks leave rank 0 to speak first
_ANSWER_SECONDS = 30.0
_WRITING_SECONDS = 8.0


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What is going on, for people; how long it may take; the folder of stacks that tells of it."""

    what: str
    seconds: float
    folder: str
    since: float


class Watchdog:
    """Of one rank; `expect` says what it waits for next. `describe` may write more about it, on rank 0."""

    def __init__(self, output: str, rank: int) -> None:
        self.describe: Callable[[Path], None] = lambda folder: None
        self._stacks, self._rank = Path(output) / "stacks", rank
        self._expected: Expectation | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def expect(self, what: str, seconds: float, folder: str) -> None:
        """From now on `what` is going on; 0 seconds: it may take as long as it likes."""
        expected = Expectation(what=what, seconds=seconds, folder=folder, since=time.monotonic())
        self._expected = expected if seconds else None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        last, asleep, seen = time.monotonic(), 0.0, None
        while not self._closed.wait(_TICK_SECONDS):
            now, expected = time.monotonic(), self._expected
            if expected is not seen:
                seen, asleep = expected, 0.0
            if expected and now - last > _ASLEEP_SECONDS:
                asleep += now - max(last, expected.since)
            last = now
            if expected is None:
                continue
            limit = expected.seconds + (_OTHERS_SECONDS if self._rank else 0)
            if now - expected.since - asleep > limit:
                self._overdue(expected, now - expected.since)
                return

    def _overdue(self, expected: Expectation, seconds: float) -> None:
        folder = self._stacks / expected.folder
        why = f"{expected.what} has taken {seconds:,.0f} seconds, more than {expected.seconds:,.0f}: stacks in {folder}"
        line = lifeline()
        if line is None:
            within(_WRITING_SECONDS, lambda: write_stacks(folder, self._rank))
            within(_WRITING_SECONDS, lambda: self.describe(folder))
            end_process(1, why)
            return
        line.say("overdue", why=why, folder=str(folder))
        if self._rank == 0:
            within(_WRITING_SECONDS, lambda: self.describe(folder))
        if not self._closed.wait(_ANSWER_SECONDS):  # the verdict ends the process
            within(_WRITING_SECONDS, lambda: write_stacks(folder, self._rank))
            end_process(1, f"{why}; rank 0 does not answer: stopped, or its machine is gone")


_watchdog: Watchdog | None = None


@contextlib.contextmanager
def watched(output: str, rank: int, startup_seconds: float) -> Iterator[None]:
    """Inside it a watchdog waits, first for the start-up; stacks go to `output`/stacks."""
    global _watchdog
    _watchdog = Watchdog(output, rank)
    _watchdog.expect("the start-up", startup_seconds, "start-up")
    try:
        yield
    finally:
        _watchdog.close()
        _watchdog = None


def watchdog() -> Watchdog | None:
    """The one that watches this rank, where one does."""
    return _watchdog
