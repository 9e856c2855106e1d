"""What the files of a run say of it, whatever state it was left in."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from fake_checkpoints import write_fake_checkpoint

from megatron_lpr.errors import UserError
from megatron_lpr.files import json_lines
from megatron_lpr.reporting import sound_record
from megatron_lpr.training import run_files
from megatron_lpr.training.run_status import run_status
from megatron_lpr.training.status_rows import status_rows

START = datetime(2026, 11, 25, 12, tzinfo=UTC)


def at(seconds):
    return (START + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


class Run:
    """An output folder that a test fills."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.append("starts", {"time": at(0), "step": 0})

    def append(self, name, *records):
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def steps(self, first, last, seconds_per_step=10, begin=0, **more):
        for step in range(first, last + 1):
            record = {"step": step, "steps": 20, "stage": "stage 1", "seconds": 9.0, "tokens_per_second": 100.0}
            record |= {"ntp_loss": 4 - step / 10, "balance_loss": None, "lpr_loss": 0.5, "skipped_steps": 1}
            self.append("metrics", record | {"time": at(begin + step * seconds_per_step)} | more)

    def checkpoint(self, step, seconds):
        folder = write_fake_checkpoint(self.folder / "checkpoints", step)
        os.utime(folder / "run.json", (START.timestamp() + seconds,) * 2)
        (self.folder / "checkpoints/latest").write_text(folder.name)

    def status(self, seconds):
        return run_status(str(self.folder), START + timedelta(seconds=seconds))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


@pytest.fixture
def held(run, monkeypatch):
    monkeypatch.setattr("megatron_lpr.training.run_status.holder_of", lambda folder: {"host": "n1", "pid": 7})
    return run


def test_the_last_validation_may_be_long_ago(run, monkeypatch):
    assert run.status(0).validation is None
    (run.folder / "recipe.yaml").write_text("evaluation: {every: 5}")
    assert run.status(0).validation is None
    run.steps(1, 4)
    found = {"bits_per_byte": {"hu": 1.5, "en": 1.0}, "retention": {"en": 99.0}}
    run.steps(5, 5, validation=found | {"bits_per_byte": {"hu": 2.0, "en": 2.0}})
    run.steps(6, 6, validation=found)
    run.steps(7, 300)
    for size in (100, 4096, 1 << 20):  # of what is read at once, from the end
        monkeypatch.setattr(json_lines, "BLOCK_BYTES", size)
        assert run_files.last_validation(run.folder / "metrics.jsonl") == {"step": 6, **found}
    assert run.status(0).validation == {"step": 6, **found}


def test_a_run_that_goes_on(held):
    held.steps(1, 10)
    held.checkpoint(8, 80)
    status = held.status(105)
    assert (status.state, status.reason, status.name) == ("running", None, "stage 1")
    assert (status.step, status.steps, status.eta_seconds, status.seconds_per_step) == (10, 20, 100, 10)
    assert status.losses == {"ntp_loss": 3.0, "lpr_loss": 0.5} and status.trend == pytest.approx(-0.5)
    assert (status.checkpoint_step, status.checkpoint_age_seconds, status.checkpoint_fault) == (8, 25, None)
    assert (status.last_record, status.last_record_age_seconds) == (at(100), 5)
    assert (status.skipped_steps, status.held_by) == (1, {"host": "n1", "pid": 7})


def test_an_end_is_of_the_start_that_it_names_whatever_the_clocks_say(run):
    run.append("ends", {"time": at(500), "start": at(0), "rank": 0, "step": 2, "outcome": "stopped", "reason": None})
    run.append("starts", {"time": at(300), "step": 2})  # on a host whose clock is behind
    assert run.status(600).state == "failed"  # killed
    run.append("ends", {"time": at(200), "start": at(300), "rank": 0, "step": 3, "outcome": "stopped", "reason": None})
    assert run.status(600).state == "stopped"


def test_a_run_that_starts_has_no_eta_yet(held):
    status = held.status(30)
    assert (status.state, status.step, status.steps, status.eta_seconds) == ("running", 0, None, None)


@pytest.mark.parametrize(
    "seconds_per_step, silence, state", [(10, 599, "running"), (10, 601, "stale"), (60, 601, "running")]
)
def test_silence(held, seconds_per_step, silence, state):
    held.steps(1, 2, seconds_per_step)
    status = held.status(2 * seconds_per_step + silence)
    assert status.state == state
    assert status.reason == (
        "a process holds the run and has written nothing for 10 minutes" if state == "stale" else None
    )


@pytest.mark.parametrize(
    "ends, expected",
    [
        ([], ("failed", "no process holds the run, and it has ended without a word: killed, or its machine went down")),
        ([{"outcome": "finished", "reason": None}], ("finished", None)),
        ([{"outcome": "stopped", "reason": "KeyboardInterrupt"}], ("stopped", "KeyboardInterrupt")),
        (
            [{"outcome": "failed", "reason": "out of memory"}, {"outcome": "failed", "reason": "connection closed"}],
            ("failed", "out of memory"),
        ),
    ],
)
def test_ends(run, ends, expected):
    run.steps(1, 3)
    run.append("ends", {"time": at(-5), "start": at(-9), "outcome": "failed", "reason": "of an earlier one"})
    run.append("ends", *({"time": at(40 + i), "start": at(0)} | end for i, end in enumerate(ends)))
    status = run.status(100)
    assert (status.state, status.reason) == expected and status.eta_seconds is None


def test_what_was_asked_to_stop_says_by_whom(run):
    run.append("ends", {"time": at(40), "start": at(0), "outcome": "stopped", "reason": None})
    (run.folder / "stopped").write_text("stopped by SIGTERM after step 3\n")
    assert run.status(50).reason == "stopped by SIGTERM after step 3"


def test_a_run_of_an_older_version_is_finished_by_its_last_checkpoint(run):
    run.steps(1, 20)
    run.checkpoint(20, 200)
    assert run.status(300).state == "finished"


def test_a_run_that_was_killed_before_its_last_step_was_saved_is_not_finished(run):
    run.steps(1, 20)
    run.checkpoint(15, 150)
    assert run.status(300).state == "failed"


def test_a_finished_run_that_was_killed_when_it_was_extended_is_not_finished(run):
    run.steps(1, 20)
    run.checkpoint(20, 200)
    (run.folder / "recipe.yaml").write_text("train: {trainable: routers, steps: 30}")
    run.append("starts", {"time": at(300), "step": 20})
    status = run.status(400)
    assert (status.state, status.step, status.steps) == ("failed", 20, 30)


def test_the_time_between_starts_is_no_time_of_a_step(held):
    held.steps(1, 4)
    held.append("starts", {"time": at(5000), "step": 4})
    held.steps(5, 6, begin=5000)
    assert held.status(5070).seconds_per_step == 10


def test_skipped_steps_have_no_loss(held):
    held.steps(1, 4)
    held.steps(5, 5, ntp_loss=None)
    status = held.status(60)
    assert status.step == 5 and status.losses["ntp_loss"] == 3.6


def test_only_the_end_of_a_long_log_is_read(held, monkeypatch):
    read, from_end = [], json_lines.lines_from_the_end
    monkeypatch.setattr(run_files, "lines_from_the_end", lambda path: (read.append(x) or x for x in from_end(path)))
    (held.folder / "metrics.jsonl").write_text("damaged, long ago\n" * 1000)
    held.steps(1, 20)
    status = held.status(200)
    assert (status.trend_steps, status.damaged_lines) == (20, 80) and len(read) <= 110


def test_a_record_may_be_longer_than_what_is_read_at_once(held, monkeypatch):
    """Of 200 languages, 80 layers and 256 experts the last step's is 90 MB."""
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 100)
    router = {"hu": {"frozen_share": [0.5] * 80, "p0": [0.5] * 80, "load": [[0.5, 0.5]] * 80}}
    held.steps(1, 4)
    held.steps(5, 5, router=router)
    parsed, from_json = [], sound_record.from_json
    monkeypatch.setattr(sound_record, "from_json", lambda line: parsed.append(len(line)) or from_json(line))
    assert (held.status(60).step, held.status(60).trend_steps) == (5, 5)
    assert max(parsed) < 1000  # without what status does not show


def test_a_last_line_that_a_killed_process_has_not_finished_is_said(held):
    held.steps(1, 2)
    assert held.status(30).faults == []
    for name in ("metrics", "starts", "ends"):
        with (held.folder / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 3, "ti')
    status = held.status(30)
    assert (status.step, status.damaged_lines) == (2, 0)
    assert status.faults == [f"{name}.jsonl: {run_files.CUT}" for name in ("starts", "ends", "metrics")]


def test_lines_of_starts_and_ends_that_are_none_are_counted(run):
    """A torn line gets its end when the next start writes."""
    run.append("ends", {"time": at(40), "start": at(0), "outcome": "finished"}, [1], {"outcome": "failed"})
    with (run.folder / "starts.jsonl").open("a") as file:
        file.write('{"step": 3, "ti\n')
    status = run.status(50)
    assert status.state == "finished"
    said = "lines near its end that are no records with a time"
    assert status.faults == [f"starts.jsonl: {said}: 1", f"ends.jsonl: {said}: 2"]
    assert status_rows(status)["left out"] == "; ".join(status.faults)


def test_lines_that_are_no_records_are_left_out_and_counted(held):
    held.steps(1, 9)
    assert held.status(30).damaged_lines == 0
    for damaged in ([1], {"step": "10"}, {"step": 10, "ntp_loss": "x"}):
        held.append("metrics", damaged)
    status = held.status(30)
    assert (status.step, status.damaged_lines) == (9, 3)
    assert status_rows(status)["log"] == "lines near the end of metrics.jsonl left out: 3, no steps' records"


def test_a_recipe_that_was_edited(held):
    held.append("starts", {"time": "2026-11-25T12:00:00.000Z"})
    (held.folder / "recipe.yaml").write_text("train: {steps: many}\nevaluation: [every]\n")
    assert held.status(30).steps is None


def test_of_a_list_that_was_edited_the_wrong_entry_is_left_out(held):
    good = {"name": "a", "language": "hu", "role": "expanded", "files": ["a.txt"]}
    tree = {"evaluation": {"corpora": [good, {**good, "role": "x"}, 7]}, "model": {"mlp_only_layers": [3, -1]}}
    (held.folder / "recipe.yaml").write_text(json.dumps(tree))
    files = run_files.RunFiles.read(str(held.folder))
    assert [corpus["name"] for corpus in files.section("evaluation")["corpora"]] == ["a"]
    assert files.section("model")["mlp_only_layers"] == [3]
    assert [fault.split(": ")[1] for fault in files.faults] == [
        "model.mlp_only_layers[1]",
        "evaluation.corpora[1].role",
        "evaluation.corpora[2]",
    ]


def test_checkpoints_that_are_damaged_are_told(held):
    held.steps(1, 9)
    held.checkpoint(8, 80)
    (held.folder / "checkpoints/step_00000008/.metadata").unlink()
    status = held.status(100)
    assert status.checkpoint is None and "step_00000008" in status.checkpoint_fault


def test_a_checkpoint_with_a_file_cut_off_is_not_the_last_one(held):
    held.steps(1, 9)
    held.checkpoint(4, 40)
    held.checkpoint(8, 80)
    os.truncate(held.folder / "checkpoints/step_00000008/.metadata", 1)
    status = held.status(100)
    assert status.checkpoint_step == 4
    assert "latest names step_00000008, which is damaged (.metadata has 1 bytes in place of" in status.checkpoint_fault
    os.truncate(held.folder / "checkpoints/step_00000004/.metadata", 1)
    status = held.status(100)
    assert status.checkpoint is None and "none there is complete" in status.checkpoint_fault


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda folder: None, "no such folder; give the output folder of a run"),
        (lambda folder: folder.mkdir(), "no training run there"),
    ],
)
def test_what_is_no_run(tmp_path, make, sentence):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=sentence):
        run_status(str(tmp_path / "x"))


def test_nothing_heavy_is_imported():
    look = "import sys, megatron_lpr.cli, megatron_lpr.training.run_status as s; s.run_status"
    look += "; sys.exit(bool({'torch', 'numpy', 'tqdm', 'matplotlib'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", look], check=True)
