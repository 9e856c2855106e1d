"""Rank 0's end of the lifelines: hears which rank ends or dies, decides what has ended the run, and tells all ranks.

A thread of its own, which knows nothing of process groups. A closed connection is how the kernel says that a process is
gone, whatever it was doing: no beat has to be sent in time, and nothing misfires while a rank is busy or stopped.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

_FIRST_HAND_SECONDS = 2.0  # that a better reason may come later than one that another rank has caused
_STACKS_SECONDS = 10.0  # for ranks to write their stacks; one that has not answered then is named


@dataclass(eq=False)
class _Peer:
    """A connection. It is no rank before it has said hello."""

    socket: socket.socket
    rank: int = -1
    place: str = ""  # for people
    unread: bytearray = field(default_factory=bytearray)
    is_ending: bool = False  # it has said that, and why


class Hub(threading.Thread):
    """Listens on `port` from the start. Who does not know `token` is no rank of this run."""

    def __init__(self, token: str) -> None:
        super().__init__(name="lifeline hub", daemon=True)
        if socket.has_dualstack_ipv6():
            self._door = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        else:
            self._door = socket.create_server(("", 0), backlog=4096)
        self.port: int = self._door.getsockname()[1]
        self._token, self._is_over = token, False
        self._peers: list[_Peer] = []
        self._verdict: dict[str, Any] | None = None  # what is going to be told, perhaps
        self._decide_at: float | None = None
        self._silent: set[_Peer] | None = None  # those that owe an answer, once stacks are asked for
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)

    def run(self) -> None:
        while not self._is_over:
            wait = None if self._decide_at is None else max(0.0, self._decide_at - time.monotonic())
            for key, _ in self._selector.select(wait):
                if key.data is None:
                    self._let_in()
                else:
                    self._read(key.data)
            if self._decide_at is not None and time.monotonic() >= self._decide_at:
                self._decide()
        for peer in list(self._peers):
            self._drop(peer)
        self._door.close()

    def leave_to_parent(self) -> None:
        """In a process that was forked: the kernel closes no connection of which that holds an end."""
        for held in (self._door, *(peer.socket for peer in self._peers)):
            close_here(held)

    def _let_in(self) -> None:
        connection, _ = self._door.accept()
        keep_alive(connection)
        connection.settimeout(1.0)  # for sending: nobody is waited for
        peer = _Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.socket.recv(1 << 16)
        except OSError:
            received = b""
        if not received:
            self._drop(peer)
            if peer.rank >= 0 and not peer.is_ending and not self._is_over:
                why = f"{peer.place} has died without a word, as by SIGKILL or for want of memory"
                self._heard(peer, {"kind": "end", "status": 1, "why": why})
            return
        peer.unread += received
        while (end := peer.unread.find(b"\n")) >= 0:
            line = bytes(peer.unread[:end])
            del peer.unread[: end + 1]
            if peer.rank < 0:
                self._greet(peer, line)
            else:
                self._heard(peer, json.loads(line))

    def _greet(self, peer: _Peer, line: bytes) -> None:
        """Anybody may connect to a port."""
        try:
            hello = json.loads(line)
            if hello["token"] == self._token:
                peer.rank = hello["rank"]
                peer.place = f"rank {peer.rank} (process {hello['pid']} on {hello['host']})"
                return
        except (ValueError, TypeError, KeyError):
            pass
        peer.unread.clear()
        self._drop(peer)

    def _heard(self, peer: _Peer, message: dict[str, Any]) -> None:
        kind = message.pop("kind")
        if kind == "bye":
            peer.is_ending = True
            if peer.rank == 0:
                self._tell({"kind": "bye"})
                self._is_over = True
        elif kind == "end":
            peer.is_ending = True
            self._suspect({"rank": peer.rank} | message, now=not message.pop("second_hand", False))
        elif kind == "overdue" and self._silent is None:
            self._silent = {peer for peer in self._peers if peer.rank >= 0}
            self._suspect({"rank": None, "status": 1, "why": message["why"]}, now=False, seconds=_STACKS_SECONDS)
            self._tell({"kind": "stacks", "folder": message["folder"]})
        elif kind == "dumped" and self._silent:
            self._silent.discard(peer)
            if not self._silent:
                self._decide()

    def _suspect(self, verdict: dict[str, Any], *, now: bool, seconds: float = _FIRST_HAND_SECONDS) -> None:
        if self._decide_at is None and self._verdict:
            return  # decided
        if now or self._verdict is None:
            self._verdict, self._decide_at = verdict, time.monotonic() + (0 if now else seconds)

    def _decide(self) -> None:
        assert self._verdict
        if self._silent:
            silent = ", ".join(peer.place for peer in sorted(self._silent, key=lambda peer: peer.rank))
            self._verdict["why"] += f"; no answer from {silent}: stopped, or its machine is gone"
        self._decide_at, self._silent = None, None
        self._tell({"kind": "verdict", **self._verdict})

    def _tell(self, message: dict[str, Any]) -> None:
        # rank 0 last: it may end this process
        for peer in sorted(self._peers, key=lambda peer: -peer.rank):
            send(peer.socket, message)

    def _drop(self, peer: _Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.socket.close()


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """One line of JSON; nothing where the other end is gone, which its reader will find out."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return


def close_here(held: socket.socket) -> None:
    """This process' descriptor alone: without a shutdown, and whatever else holds the object."""
    with contextlib.suppress(OSError):  # it is closed already
        os.close(held.detach())


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out, in less than a minute, that a machine is gone or cannot be reached any more."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6), ("TCP_USER_TIMEOUT", 45_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
