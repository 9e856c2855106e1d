"""What rank 0 makes of what ranks say, and of connections that close."""

import json
import socket
import time
from types import SimpleNamespace

import pytest

from megatron_lpr.platform import hub as hub_module
from megatron_lpr.platform.hub import Hub, send


class Rank:
    """The other end of a connection."""

    def __init__(self, hub, rank, token="t"):
        self.socket = socket.create_connection(("127.0.0.1", hub.port), timeout=20)
        self.lines = self.socket.makefile("rb")
        self.say("hello", rank=rank, token=token, host="here", pid=100 + rank)

    def say(self, kind, **more):
        send(self.socket, {"kind": kind, **more})

    def hears(self):
        line = self.lines.readline()
        return json.loads(line) if line else None

    def dies(self):
        self.lines.close()
        self.socket.close()


@pytest.fixture
def jump(monkeypatch):
    """Seconds to add to what the hub's clock says."""
    seconds = [0.0]
    monkeypatch.setattr(hub_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + seconds[0]))
    return seconds


@pytest.fixture
def hub(jump):
    hub = Hub("t")
    hub.start()
    return hub


@pytest.fixture
def ranks(hub):
    there = [Rank(hub, rank) for rank in range(3)]
    wait_until(lambda: sorted(peer.rank for peer in hub._peers) == [0, 1, 2])
    yield there
    there[0].say("bye")
    hub.join(20)
    assert not hub.is_alive()
    for rank in there:
        rank.dies()


def wait_until(is_so):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def verdicts(ranks):
    return [rank.hears() for rank in ranks]


def test_a_death(ranks):
    ranks[2].dies()
    first, second = verdicts(ranks[:2])
    assert first == second and (first["kind"], first["status"], first["rank"]) == ("verdict", 1, 2)
    assert first["why"].startswith("rank 2 (process 102 on here) has died without a word")


def test_a_death_explains_the_errors_of_others(ranks):
    ranks[0].say("end", status=1, why="gloo: connection closed", second_hand=True)
    ranks[2].dies()
    assert verdicts(ranks[:2])[1]["rank"] == 2
    ranks[1].say("end", status=1, why="too late")
    ranks[1].dies()  # after it was decided nobody is told anything else
    ranks[0].say("bye")
    assert ranks[0].hears() == {"kind": "bye"}


def test_errors_of_others_alone_are_told_in_the_end(ranks):
    ranks[1].say("end", status=1, why="gloo: connection closed", second_hand=True)
    assert {verdict["why"] for verdict in verdicts(ranks)} == {"gloo: connection closed"}


def test_who_says_that_it_ends_has_not_died(ranks):
    ranks[1].say("end", status=2, why="wrong", grace=6.0)
    ranks[1].dies()
    for rank in (ranks[0], ranks[2]):
        assert rank.hears() == {"kind": "verdict", "rank": 1, "status": 2, "why": "wrong", "grace": 6.0}


def test_who_has_left_in_good_order_has_not_died(ranks, hub):
    ranks[1].say("bye")
    ranks[1].dies()
    wait_until(lambda: len(hub._peers) == 2)
    ranks[0].say("bye")
    assert ranks[0].hears() == {"kind": "bye"}


def test_silence_is_named(ranks, hub, jump):
    ranks[1].say("overdue", why="step 3 takes too long", folder="f")
    assert verdicts(ranks) == [{"kind": "stacks", "folder": "f"}] * 3
    ranks[2].say("overdue", why="step 3 takes too long, also", folder="f")
    ranks[0].say("dumped")
    ranks[1].say("dumped")
    wait_until(lambda: len(hub._silent) == 1)
    jump[0] = 3600
    ranks[0].say("dumped")  # the hub looks at the clock
    heard = ranks[0].hears()
    assert heard["status"] == 1 and heard["why"] == (
        "step 3 takes too long; no answer from rank 2 (process 102 on here): stopped, or its machine is gone"
    )


def test_all_have_answered(ranks):
    ranks[0].say("overdue", why="step 3 takes too long", folder="f")
    for rank in ranks:
        assert rank.hears()["kind"] == "stacks"
        rank.say("dumped")
    assert {verdict["why"] for verdict in verdicts(ranks)} == {"step 3 takes too long"}


def test_strangers_are_not_heard(ranks):
    name = ranks[0].socket.getpeername()
    stranger = socket.create_connection(name[:2], timeout=20)
    send(stranger, {"kind": "end", "status": 0, "why": "x"})
    assert stranger.recv(1) == b""
    stranger.close()
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"kind": "hello"}\n'):
        stranger = socket.create_connection(name[:2], timeout=20)
        stranger.sendall(nonsense)
        assert stranger.recv(1) == b""
        stranger.close()
    ranks[1].say("end", status=2, why="wrong")
    assert ranks[0].hears()["why"] == "wrong"
