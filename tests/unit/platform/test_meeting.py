"""What stops one rank stops all, and one of them tells it; nobody waits for a rank that has given up."""

import os
import subprocess
import sys
import time

import pytest

from megatron_lpr.errors import AlreadyTold, UserError
from megatron_lpr.platform import meeting, same_on_all_ranks, together
from megatron_lpr.testing.run_distributed import free_port, run_distributed


def attempt(failing, message, *, inside_step, late=None, kind=UserError):
    """On a rank: (what it reported, how it ended, seconds)."""
    from megatron_lpr.platform import Ranks

    ranks = Ranks.from_environment()
    reported, start = [], time.monotonic()

    def step():
        if ranks.rank == late:
            time.sleep(1)
        if ranks.rank in failing:
            raise kind(message.format(rank=ranks.rank))
        return ranks.rank

    try:
        with meeting(ranks.rank, ranks.world_size, lambda error: reported.append(str(error)), timeout_minutes=1):
            assert together(lambda: "first") == "first"
            if inside_step:
                assert together(step) == ranks.rank
            else:
                step()
            end = "done"
    except AlreadyTold:
        end = "told"
    except kind as error:
        end = str(error)
    return reported, end, time.monotonic() - start


def disagree():
    """On a rank: what it reported of a value that rank 1 sees otherwise."""
    from megatron_lpr.platform import Ranks

    rank, reported = Ranks.from_environment().rank, []
    with pytest.raises(AlreadyTold), meeting(rank, 2, lambda error: reported.append(str(error)), timeout_minutes=1):
        for folder in ("a", "b"):  # one after the other
            same_on_all_ranks("the folder", folder)
        same_on_all_ranks("the step", str(rank))
    return reported


WITHOUT_A_WORD = """
import contextlib, os, time
from megatron_lpr.errors import AlreadyTold, UserError
from megatron_lpr.platform import meeting, together
from megatron_lpr.platform.meeting import meeting_store

rank = int(os.environ["RANK"])
try:
    with meeting(rank, 3, print):
        if rank == 0:
            meeting_store().wait(["here1", "here2"])
            time.sleep(1)
            os._exit(1)
        meeting_store().set(f"here{rank}", "")
        if rank == 1:
            with contextlib.suppress(Exception):  # until rank 0 is gone
                while True:
                    meeting_store().add("looks", 1)
                    time.sleep(0.1)
            raise UserError("my own")
        together(lambda: None)
except AlreadyTold:
    pass
"""


NOTHING_TO_DO = """
import importlib, os, time
from megatron_lpr.platform import meeting, together


class Slow:
    def __init__(self, notes):
        self.notes = notes

    def __getattr__(self, name):
        return getattr(self.notes, name)

    def get(self, name):
        time.sleep(1)
        return self.notes.get(name)


rank = int(os.environ["RANK"])
with meeting(rank, 3, print):
    if rank:
        current = importlib.import_module("megatron_lpr.platform.meeting")._current
        current._notes = Slow(current._notes)
    together(lambda: None)
os._exit(0)
"""


def attempts(cases):
    """All cases in one set of processes; each has a meeting of its own port."""
    results = []
    for port, case in cases:
        os.environ["MASTER_PORT"] = str(port)
        results.append(attempt(**case))
    return results


CASES = {
    "nobody": {"failing": (), "message": "", "inside_step": True},
    "rank 0": {"failing": (0,), "message": "no lock", "inside_step": True},
    "rank 2": {"failing": (2,), "message": "no file", "inside_step": True},
    "all, the same": {"failing": (0, 1, 2), "message": "wrong", "inside_step": True},
    "all, not together": {"failing": (0, 1, 2), "message": "not finite", "inside_step": False},
    "late host": {"failing": (0, 1, 2), "message": "not finite", "inside_step": False, "late": 0},
    "each its own": {"failing": (0, 1), "message": "rank {rank}", "inside_step": False},
    "a bug": {"failing": (1,), "message": "a bug", "inside_step": True, "kind": ZeroDivisionError},
}


@pytest.fixture(scope="module")
def outcomes():
    """Per case, what each of three ranks says."""
    cases = [(free_port(), case) for case in CASES.values()]
    ranks = run_distributed(attempts, 3, cases, timeout_seconds=300)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(CASES)}


def reports(outcome):
    return sorted(message for reported, *_ in outcome for message in reported)


def ends(outcome):
    return [end for _, end, _ in outcome]


def test_all_go_on(outcomes):
    assert ends(outcomes["nobody"]) == ["done"] * 3 and reports(outcomes["nobody"]) == []


@pytest.mark.parametrize("name, message", [("rank 0", "no lock"), ("rank 2", "no file")])
def test_one_rank_stops_all_and_tells(outcomes, name, message):
    assert ends(outcomes[name]) == ["told"] * 3 and reports(outcomes[name]) == [message]
    teller = int(name[-1])
    assert outcomes[name][teller][0] == [message]
    assert max(seconds for *_, seconds in outcomes[name]) < 30  # those that meet nobody wait for a minute


@pytest.mark.parametrize("name", ["all, the same", "all, not together", "late host"])
def test_the_same_error_of_all_ranks_is_told_once(outcomes, name):
    assert ends(outcomes[name]) == ["told"] * 3 and len(reports(outcomes[name])) == 1


def test_different_errors_are_all_told(outcomes):
    assert reports(outcomes["each its own"]) == ["rank 0", "rank 1"]
    assert ends(outcomes["each its own"]) == ["told", "told", "done"]


def test_a_bug_of_one_rank_stops_all(outcomes):
    assert ends(outcomes["a bug"]) == ["told", "a bug", "told"] and reports(outcomes["a bug"]) == []


def test_ranks_that_see_different_files():
    [sentence] = sum(run_distributed(disagree, 2), [])
    assert sentence.startswith("the step is ") and "the ranks do not see the same files" in sentence


def run_script(script):
    """Exit statuses of three ranks, and what they printed."""
    common = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], printed


def test_rank_0_waits_for_those_that_still_read_there():
    assert run_script(NOTHING_TO_DO) == ([0, 0, 0], ["", "", ""])


def test_rank_0_that_ends_without_a_word():
    statuses, printed = run_script(WITHOUT_A_WORD)
    assert statuses == [1, 0, 0]
    assert printed[1] == "my own\n" and printed[2].startswith("rank 0 has ended before the ranks had agreed")


def test_ranks_that_do_not_come(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT: the 2 ranks cannot meet there"):
        with meeting(0, 2, report=None, timeout_minutes=0.02):
            pass


def test_alone_errors_are_the_callers_to_report():
    with pytest.raises(UserError, match="x") as raised, meeting(0, 1, report=None):
        together(lambda: (_ for _ in ()).throw(UserError("x")))
    assert not isinstance(raised.value, AlreadyTold)
