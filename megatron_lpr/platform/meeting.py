"""The ranks of a command before they are a process group: what stops one of them stops all, and one of them tells it.

They meet at the store that the process group is made at afterwards, so that no rank waits in it for one that has
given up. Alone, or outside a meeting, everything is done at once.
"""

import contextlib
import datetime
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch.distributed as dist

from megatron_lpr.errors import AlreadyTold, UserError

T = TypeVar("T")
_PATIENCE_SECONDS = 5.0


class Meeting:
    """The ranks at one store."""

    def __init__(self, rank: int, world_size: int, timeout_minutes: float) -> None:
        """Waits for all ranks; UserError where they cannot meet."""
        self.rank, self.world_size, self._topics = rank, world_size, 0
        timeout = datetime.timedelta(minutes=timeout_minutes)
        try:
            self.store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        except dist.DistError as error:
            raise UserError(
                f"MASTER_ADDR, MASTER_PORT: the {world_size} ranks cannot meet there ({str(error).splitlines()[0]}); "
                "look whether all have started, and whether another run has the port"
            ) from error
        self._notes = dist.PrefixStore("meeting", self.store)

    def agree(self, step: Callable[[], T]) -> T:
        """step() on every rank, all of which have done it when this returns.

        Raises:
            UserError: it failed on this rank.
            AlreadyTold: it failed on another.
        """
        topic, self._topics = f"topic{self._topics}", self._topics + 1
        try:
            result = step()
        except (KeyboardInterrupt, SystemExit):
            raise  # lifelines tell it
        except BaseException as error:
            with contextlib.suppress(dist.DistError):  # the rank with the store has ended
                self._notes.set(f"{topic}/error", f"rank {self.rank}: {error}")
                self._notes.set(f"{topic}/outcome", "failed")
            raise
        try:
            if self._notes.add(f"{topic}/done", 1) == self.world_size:
                self._notes.set(f"{topic}/outcome", "done")
            if self._notes.get(f"{topic}/outcome") == b"done":
                return result
            raise AlreadyTold(self._notes.get(f"{topic}/error").decode())
        except dist.DistNetworkError:
            raise UserError("rank 0 has ended before the ranks had agreed; look at what it printed last") from None

    def collect(self, lines: Callable[[], Iterable[str]]) -> list[str]:
        """lines() of all ranks, sorted, the same list on each of them; fails as `agree` does."""
        topic = f"lines{self._topics}"

        def tell() -> None:
            for line in lines():
                self._notes.set(f"{topic}/{self._notes.add(topic, 1)}", line)

        self.agree(tell)
        told = (f"{topic}/{n + 1}" for n in range(self._notes.add(topic, 0)))
        return self.agree(lambda: sorted(self._notes.get(name).decode() for name in told))

    def check_same(self, what: str, value: str) -> None:
        """Raises UserError where another rank has said another value of `what`."""
        # a run that passes over a damaged checkpoint asks again, with another value
        first = self._notes.compare_set(f"same{self._topics}/{what}", "", value).decode()
        if first != value:
            raise UserError(
                f"{what} is {value} on rank {self.rank} and {first} on another: the ranks do not see the same files; "
                "wait until the file system has caught up, and start the run again"
            )

    def tell(self, error: UserError, report: Callable[[UserError], None]) -> None:
        """Reports an error unless another rank has reported the same, or one of its own that stopped this rank.

        Ranks wait for the report for some seconds, as a launcher may kill all when the first has ended.
        """
        patience = datetime.timedelta(seconds=_PATIENCE_SECONDS)
        name = f"told/{hashlib.sha256(str(error).encode()).hexdigest()}"
        is_untold = not isinstance(error, AlreadyTold)
        try:
            if is_untold and self._notes.add(name, 1) == 1:
                report(error)
                self._notes.set("reported", "yes")
            is_untold = False
            self._notes.wait(["reported"], patience)
        except dist.DistError:  # the rank with the store has ended, or the one that stopped this one without a report
            if is_untold:
                report(error)
        self.leave()

    def leave(self) -> None:
        """The rank that has the store waits some seconds for the others, which may still have to read there."""
        with contextlib.suppress(dist.DistError):
            gone, deadline = self._notes.add("gone", 1), time.monotonic() + _PATIENCE_SECONDS
            while self.rank == 0 and gone < self.world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                gone = self._notes.add("gone", 0)


_current: Meeting | None = None


@contextlib.contextmanager
def meeting(
    rank: int, world_size: int, report: Callable[[UserError], None], timeout_minutes: float = 30.0
) -> Iterator[None]:
    """Inside it the ranks of a command agree; a UserError that leaves it among several is an AlreadyTold."""
    global _current
    if world_size == 1:
        yield
        return
    _current = Meeting(rank, world_size, timeout_minutes)
    try:
        yield
        _current.leave()
    except UserError as error:
        _current.tell(error, report)
        raise AlreadyTold(str(error)) from error
    finally:
        _current = None


def together(step: Callable[[], T]) -> T:
    """step() on every rank of the meeting, where there is one; fails on all ranks when it fails on one."""
    return _current.agree(step) if _current else step()


def collected(lines: Callable[[int, int], Iterable[str]]) -> list[str]:
    """lines(rank, ranks) of every rank of the meeting, sorted, the same on all; without one lines(0, 1)."""
    if not _current:
        return sorted(lines(0, 1))
    rank, ranks = _current.rank, _current.world_size
    return _current.collect(lambda: lines(rank, ranks))


def same_on_all_ranks(what: str, value: str) -> None:
    """Raises UserError, on all ranks, where `value` differs between them."""
    if _current:
        _current.agree(lambda: _current.check_same(what, value))


def meeting_store() -> dist.Store | None:
    """The store of the meeting, where there is one."""
    return _current.store if _current else None
