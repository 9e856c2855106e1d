"""Ranks hold lifelines to rank 0 while a command runs: when one dies, fails or is ended, all end within seconds.

Without them the others would wait in a collective until it times out. The reason is told on rank 0. What fails by an
exception says so before it ends; of what dies without a word the kernel closes the connection. A thread of each rank
listens, and ends the process where its main thread does not.
"""

import contextlib
import functools
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lpr.errors import Stopped, UserError, warn
from megatron_lpr.platform.distributed import Ranks
from megatron_lpr.platform.hub import Hub, close_here, keep_alive, send
from megatron_lpr.platform.stacks import within, write_stacks
from megatron_lpr.signals import end_process, listener

_CONNECT_SECONDS = 20.0
_VERDICT_SECONDS = 8.0
_GRACE_SECONDS = 6.0  # for what all ranks know, as a UserError, to be told by them in their own way
_SIGNAL_GRACE_SECONDS = 2.0  # for those who have had the signal themselves
_STACKS_SECONDS = 8.0
_OF_OTHERS = ("gloo", "nccl", "connection", "peer")  # in the errors of a rank whose collective another one has left


class Lifeline:
    """This rank's."""

    def __init__(self, rank: int, connection: socket.socket, token: str, hub: Hub | None) -> None:
        self.rank, self._connection, self._hub = rank, connection, hub
        self._sending = threading.Lock()
        self._verdict: dict[str, Any] | None = None
        self._decided, self._is_closing = threading.Event(), threading.Event()
        self.say("hello", rank=rank, token=token, host=socket.gethostname(), pid=os.getpid())
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def say(self, kind: str, **more: Any) -> None:
        with self._sending:
            send(self._connection, {"kind": kind, **more})

    def ends(self, error: BaseException) -> None:
        """Tell all that `error` ends this rank; returns only if it is the reason, or one that every rank knows."""
        if isinstance(error, Stopped):
            return
        grace = 0.0
        if isinstance(error, KeyboardInterrupt):
            status, why = listener().ending()
            why, grace = f"rank {self.rank}: {why}", _SIGNAL_GRACE_SECONDS
        elif isinstance(error, UserError):
            status, why, grace = 2, f"rank {self.rank}: error: {error}", _GRACE_SECONDS
        elif isinstance(error, SystemExit):
            status, why = _status(error), f"rank {self.rank} has ended with exit status {_status(error)}"
            if not status:
                return
        else:
            status = 1
            why = (
                f"rank {self.rank} on {socket.gethostname()} has failed: {type(error).__name__}: {error}; its own "
                "output has the traceback"
            )
        self.say("end", status=status, why=why, grace=grace, second_hand=_of_others(error))
        self._decided.wait(_VERDICT_SECONDS)
        if isinstance(error, KeyboardInterrupt) and self._verdict and self.rank:
            end_process(status)  # rank 0 tells it
        if self._verdict and self._verdict["rank"] != self.rank and not (grace and self._verdict["status"] == status):
            self._is_closing.wait()  # the thread ends the process

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside it the others are told of what ends this rank."""
        listener().on_ending = self._ended_by_signal
        try:
            yield
        except BaseException as error:
            self.ends(error)
            raise
        finally:
            self.close()

    def _ended_by_signal(self, status: int, why: str) -> None:
        if why:
            self.say("end", status=status, why=f"rank {self.rank}: {why}")
        else:
            self.close()  # the others have stopped as well, each in its own time

    def close(self) -> None:
        """This rank needs no watching any more, and watches nobody."""
        self._is_closing.set()
        self.say("bye")
        if self._hub:
            self._hub.join(_VERDICT_SECONDS)  # until it has told the others
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def leave_to_parent(self) -> None:
        """In a process that was forked, or nobody would learn of the parent's death before its own."""
        close_here(self._connection)
        if self._hub:
            self._hub.leave_to_parent()

    def _listen(self) -> None:
        with self._connection, self._connection.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                message = json.loads(line)
                match message["kind"]:
                    case "bye":
                        return
                    case "stacks":
                        if within(_STACKS_SECONDS, functools.partial(write_stacks, Path(message["folder"]), self.rank)):
                            self.say("dumped")
                    case "verdict":
                        self._obey(message)
        if not self._is_closing.is_set():
            end_process(1, "rank 0 has died without a word, as by SIGKILL or for want of memory: this rank ends too")

    def _obey(self, verdict: dict[str, Any]) -> None:
        self._verdict = verdict
        self._decided.set()
        mine = verdict["rank"] == self.rank
        grace = 2 * _VERDICT_SECONDS if mine else verdict.get("grace", 0.0)
        if not self._is_closing.wait(grace):
            end_process(verdict["status"], verdict["why"] if self.rank == 0 else "")


_line: Lifeline | None = None
_lines, _is_inside = 0, False


def _in_forked_process() -> None:
    global _line
    if _line:
        _line.leave_to_parent()
        _line = None


os.register_at_fork(after_in_child=_in_forked_process)


def lifeline() -> Lifeline | None:
    """This rank's, inside `connected` and among several."""
    return _line


@contextlib.contextmanager
def connected(ranks: Ranks, store: Callable[[], dist.Store | None]) -> Iterator[None]:
    """Inside it all ranks end when one does. Outside of several ranks, or inside another one, nothing changes.

    Args:
        store: through which all ranks find rank 0; asked for only where it is needed.
    """
    global _line, _is_inside
    if ranks.world_size == 1 or _is_inside:
        yield
        return
    found = store()
    assert found is not None
    line = _line = _connect(ranks.rank, found)
    _is_inside = True
    try:
        if line is None:
            yield
        else:
            with line.held():
                yield
    finally:
        _line, _is_inside = None, False


def _connect(rank: int, store: dist.Store) -> Lifeline | None:
    global _lines
    key, _lines = f"lifeline{_lines}", _lines + 1  # a store may live longer than what runs in it
    hub = None
    if rank == 0:
        token = os.urandom(16).hex()
        hub = Hub(token)
        hub.start()
        store.set(key, json.dumps({"host": _own_address(), "port": hub.port, "token": token}))
    try:
        found = json.loads(store.get(key))
    except dist.DistNetworkError:
        raise UserError("rank 0 has ended before the ranks had agreed; look at what it printed last") from None
    try:
        connection = socket.create_connection((found["host"], found["port"]), timeout=_CONNECT_SECONDS)
    except OSError as error:
        warn(
            f"rank {rank} cannot reach rank 0 at {found['host']}, port {found['port']} ({error}): if it dies, the "
            "others find out when a collective times out"
        )
        return None
    connection.settimeout(None)
    keep_alive(connection)
    return Lifeline(rank, connection, found["token"], hub)


def _own_address() -> str:
    """How the other ranks reach this one: the address at which this one reaches their meeting point, or just that."""
    master = os.environ["MASTER_ADDR"]
    try:
        (family, *_, address), *_ = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            mine = probe.getsockname()[0]
    except OSError:
        return master
    return master if mine.startswith("127.") or mine == "::1" else mine


def _of_others(error: BaseException | None) -> bool:
    """Whether an error looks like the end of another rank, seen from here."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_OTHERS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _status(error: SystemExit) -> int:
    return error.code if isinstance(error.code, int) else int(error.code is not None)
