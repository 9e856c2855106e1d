"""megatron-lpr status: what is printed, for people and for programs."""

import json

import pytest

from megatron_lpr import cli
from megatron_lpr.files.json_lines import JsonLines, utc_now


@pytest.fixture
def runs(tmp_path):
    """Two runs that have ended, in different ways."""
    for name, outcome, reason in (("one", "finished", None), ("two", "failed", "the disk is full")):
        folder = tmp_path / name
        folder.mkdir()
        now = utc_now()
        record = {"step": 4, "time": now, "steps": 8, "stage": name, "ntp_loss": 1.5, "tokens_per_second": 1024.0}
        record |= {"seconds": 2.0, "balance_loss": 1.003, "tflops_per_device": 312.4, "mfu": 0.316, "skipped_steps": 2}
        slowest = {"median": 1.0, "max": 1.31, "rank": 3, "host": "n2"}
        record["ranks"] = {"compute_seconds": slowest, "memory_gb": {"max": 61.0, "rank": 0, "host": "n1"}}
        start = "2026-11-25T12:00:00.000Z"
        JsonLines(folder / "starts.jsonl").append({"time": start, "step": 0})
        JsonLines(folder / "metrics.jsonl").append(record)
        JsonLines(folder / "ends.jsonl").append({"time": now, "start": start, "outcome": outcome, "reason": reason})
    return tmp_path


def test_for_people(runs, capsys):
    assert cli.main(["status", str(runs / "one"), str(runs / "two")]) == 0
    one, two = capsys.readouterr().out.split("\n\n")
    assert one.splitlines()[0] == f"{runs}/one (one): finished, step 4 of 8 (50%)"
    assert two.splitlines()[:2] == [f"{runs}/two (two): failed, step 4 of 8 (50%)", "  reason       the disk is full"]
    assert "  losses       ntp 1.500, balance 1.003\n" in one
    assert "  speed        1,024 tok/s, 312 TFLOP/s a device, MFU 31.6%, 2 s a step\n" in one
    assert "  checkpoint   none yet\n" in one and "  skipped      2 steps\n" in one
    assert one.endswith("  slowest      rank 3 (n2), 1.31 s, median 1 s")


def test_the_trend_is_told_of_the_steps_that_it_compares(runs, capsys):
    """A loss that falls by 0.1 a step is 0.3 lower than three steps before, not than six."""
    for step in range(5, 10):
        record = {"step": step, "time": utc_now(), "steps": 9, "stage": "one", "ntp_loss": 1.9 - 0.1 * step}
        JsonLines(runs / "one" / "metrics.jsonl").append(record)
    assert cli.main(["status", str(runs / "one")]) == 0
    assert "  losses       ntp 1.000 (mean of 3 steps: -0.300 against the 3 before)\n" in capsys.readouterr().out


def test_for_programs(runs, capsys):
    assert cli.main(["status", "--json", str(runs / "one"), str(runs / "two")]) == 0
    states = [(status["name"], status["state"]) for status in json.loads(capsys.readouterr().out)]
    assert states == [("one", "finished"), ("two", "failed")]


def test_one_that_cannot_be_read_is_told_after_the_others(runs, capsys):
    assert cli.main(["status", str(runs / "none"), str(runs / "one")]) == 2
    printed = capsys.readouterr()
    assert "one (one): finished" in printed.out
    assert printed.err == (
        f"megatron-lpr status: error: run {runs}/none: no such folder; give the output folder of a run\n"
    )


def test_what_a_terminal_would_obey_is_shown_and_no_more(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    record = {"step": 1, "steps": 2, "time": "2026-11-27T10:00:00.000Z", "stage": "a\x1b]0;b\x07\x1b[2J"}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert cli.main(["status", str(run)]) == 0
    assert cli.main(["status", str(tmp_path / "\x1b[2Jnone")]) == 2
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed and "[2Jnone" in printed
