"""Commands in processes forked from this one, which has imported what takes seconds to import."""

import atexit
import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_lpr.testing.run_distributed import free_port

_GRACE_SECONDS = 30.0  # for what a process has started, to end after it; a busy machine takes its time


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: statuses of its ranks (below zero: the signal), what all printed, and what was left."""

    statuses: tuple[int, ...]
    printed: str
    has_hung: bool
    orphans: tuple[str, ...]


class ForkedCommand:
    """A command on one rank or several, each in a session of its own; prints to the file `log`.

    Args:
        command: returns its exit status.
        before: called in each process, with its rank, before the command.
    """

    def __init__(
        self,
        command: Callable[[], int],
        log: Path,
        *,
        ranks: int = 1,
        before: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self.log, port = log, free_port()
        log.touch()  # a process may be killed before it has done anything
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = [self._fork(command, rank, ranks, port, before) for rank in range(ranks)]
        self._statuses: dict[int, int] = {}

    def _fork(self, command: Callable[[], int], rank: int, ranks: int, port: int, before: Callable[[int], None]) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.setsid()
            fd = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            if ranks > 1:
                environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
            before(rank)
            status = _to_the_end(command)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def kill(self, signum: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.pids)):
            if rank not in self._statuses:
                os.kill(self.pids[rank], signum)

    def is_running(self) -> bool:
        """Whether a rank still runs."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self._statuses) < len(self.pids)

    def wait(self, seconds: float) -> Ended:
        """Until all ranks have ended; what still runs after so many seconds is killed, and so are orphans."""
        deadline = time.monotonic() + seconds
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        has_hung = self.is_running()
        if has_hung:
            self.kill(signal.SIGKILL)
        deadline = time.monotonic() + _GRACE_SECONDS
        while self.is_running() or (left := self._left()) and time.monotonic() < deadline and not has_hung:
            time.sleep(0.01)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return Ended(
            statuses=tuple(self._statuses[rank] for rank in range(len(self.pids))),
            printed=self.log.read_text(encoding="utf-8", errors="replace"),
            has_hung=has_hung,
            orphans=() if has_hung else tuple(str(process) for process in left),
        )

    def _left(self) -> list[psutil.Process]:
        """Processes in the sessions of the ranks."""
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                if process.pid in self.pids or os.getsid(process.pid) not in self.pids:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE:  # a container's first process may reap none
                    left.append(process)
        return left


def _to_the_end(command: Callable[[], int]) -> int:
    """As a process of its own would run and end it."""
    try:
        status = command()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads, as the end of Python does
    atexit._run_exitfuncs()
    return status


def import_like(command: Callable[[], int], log: Path) -> None:
    """Run a command, and import here what it has imported."""
    names = log.with_suffix(".modules")

    def note(rank: int) -> None:
        atexit.register(lambda: names.write_text("\n".join(sys.modules)))

    ended = ForkedCommand(command, log, before=note).wait(600)
    if ended.statuses != (0,):
        raise RuntimeError(f"it ended with {ended.statuses}:\n{ended.printed}")
    with warnings.catch_warnings(action="ignore"):
        for name in names.read_text().split("\n"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that collections in what is forked do not copy it all
