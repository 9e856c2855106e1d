"""What takes too long ends the process, with its stacks; what was stopped from outside does not count."""

import re
import threading
import time
from types import SimpleNamespace

import pytest

from megatron_lpr.platform import watchdog as module
from megatron_lpr.platform.stacks import within
from megatron_lpr.platform.watchdog import Watchdog


@pytest.fixture
def ended(monkeypatch):
    """Waits for the end of the process; returns its status and sentence, or nothing."""
    ends, end = [], threading.Event()
    monkeypatch.setattr(module, "end_process", lambda *how: (ends.append(how), end.set()))
    monkeypatch.setattr(module, "_TICK_SECONDS", 0.02)
    return lambda seconds: ends[0] if end.wait(seconds) else None


def test_what_takes_too_long(ended, tmp_path):
    dog = Watchdog(str(tmp_path), 0)
    dog.describe = lambda folder: (folder / "batch.txt").write_text("samples")
    dog.expect("step 1", 60, "step_1")
    dog.expect("step 2", 0.05, "step_2")
    status, sentence = ended(20)
    folder = tmp_path / "stacks/step_2"
    assert status == 1 and re.match(r"step 2 has taken \d+ seconds, more than 0: stacks in ", sentence)
    assert sentence.endswith(str(folder)) and (folder / "batch.txt").read_text() == "samples"
    stacks = (folder / "rank_00000.txt").read_text()
    assert stacks.startswith("rank 0, process ") and "test_what_takes_too_long" in stacks


@pytest.fixture
def jump(monkeypatch):
    """Seconds to add to what the watchdog's clock says."""
    seconds = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + seconds[0]))
    return seconds


def test_no_limit_and_a_closed_one(ended, tmp_path, jump, monkeypatch):
    monkeypatch.setattr(module, "_ASLEEP_SECONDS", 7200)
    dog = Watchdog(str(tmp_path), 0)
    dog.expect("step 1", 60, "step_1")
    dog.expect("step 2", 0, "step_2")
    jump[0] = 3600
    closed = Watchdog(str(tmp_path), 0)
    closed.close()
    closed.expect("step 1", 0.05, "step_1")
    assert ended(0.4) is None
    dog.close()


@pytest.mark.parametrize("seconds", [0.2, 0], ids=["in a long step", "in the first moment of one"])
def test_time_in_which_the_process_was_stopped_does_not_count(ended, tmp_path, jump, seconds):
    dog = Watchdog(str(tmp_path), 0)
    dog.expect("step 1", 50, "step_1")
    time.sleep(seconds)  # which the watchdog sees, or not yet
    jump[0] = 3600
    assert ended(0.4) is None
    dog.close()


def test_what_hangs_is_left_behind():
    never = threading.Event()
    assert not within(0.05, never.wait) and within(20, lambda: None)
    never.set()
