"""The same run twice, and a run that was killed and started again: the same numbers, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lpr.reporting.metrics_log import TIMING, read_metrics

HELD = Path(__file__).parents[1] / "helpers/train_held.py"


def numbers(folder):
    """Everything that a run logged, but for its speed; floats are compared as they are."""
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_metrics(folder / "metrics.jsonl")]


def settings(output, steps, every=0):
    assignments = {"output": output, "train.steps": steps, "checkpoint.every": every, "name": "test"}
    return [argument for key, value in assignments.items() for argument in ("--set", f"{key}={value}")]


def kill_after_first_checkpoint(command, latest, seconds=300):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + seconds
    try:
        while not latest.is_file():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate(timeout=60)  # no helper is left that holds its output open
    assert process.returncode == -signal.SIGKILL


def test_killed_run_resumes_bit_for_bit(project, tmp_path):
    """Stage 1: in one go twice, and in a process of its own that is killed by the kernel after a checkpoint."""
    whole, again, killed = (tmp_path / name for name in ("whole", "again", "killed"))
    project.run("train", "stage1", *settings(whole, 18))
    project.run("train", "stage1", *settings(again, 18))
    assert len(numbers(whole)) == 18 and numbers(whole) == numbers(again)

    # held before its second save, of which all might be written and `latest` not yet name it when the run is killed
    arguments = ["11", killed / "never", str(project.recipes["stage1"]), *settings(killed, 18, every=6)]
    latest = killed / "checkpoints/latest"
    kill_after_first_checkpoint([sys.executable, HELD, *arguments], latest)
    step = int(latest.read_text().removeprefix("step_"))
    assert step == 6
    printed = project.run("train", "stage1", *settings(killed, 18, every=6))
    assert f"resumes at step {step}" in printed
    assert numbers(killed) == numbers(whole)


def test_saving_beside_the_steps_changes_nothing(project, trained, tmp_path):
    """Every step has a checkpoint; the same numbers, and the same files, as where training waits for each."""
    folders = {}
    for way in ("true", "false"):
        folders[way] = tmp_path / way
        assignments = ("--set", f"checkpoint.asynchronous={way}", "--set", "checkpoint.keep=0")
        project.run("train", "stage1", *settings(folders[way], 6, every=1), *assignments)
    assert numbers(folders["true"]) == numbers(folders["false"])
    for step in range(1, 7):
        shares = [
            {path.name: path.read_bytes() for path in (folder / f"checkpoints/step_{step:08d}").glob("*.distcp")}
            for folder in folders.values()
        ]
        assert shares[0] == shares[1] and len(shares[0]) == 2, step
    project.run("verify", tmp_path / "true")


class Interrupted(Exception):
    """What ends a run in the middle of a step."""


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("stage2", []),
        ("moe_full", ["--set", "parallel.distributed_optimizer=false"]),
        ("stage1", ["--set", "model.dtype=bfloat16", "--set", "model.load=null"]),
    ],
    ids=["stage2", "whole_optimizer", "bf16"],
)
def test_interrupted_run_resumes_bit_for_bit(project, trained, tmp_path, monkeypatch, stage, changes):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    project.run("train", stage, *settings(whole, 6), *changes)

    from megatron_lpr.training.train import Trainer

    step = Trainer.train_step

    def interrupted(trainer):
        if trainer.step == 5:
            raise Interrupted
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(Interrupted):
            project.run("train", stage, *settings(stopped, 6, every=2), *changes)
    assert [record["step"] for record in numbers(stopped)] == [1, 2, 3, 4, 5]
    assert sorted(os.listdir(stopped / "checkpoints")) == ["latest", "step_00000002", "step_00000004"]

    printed = project.run("train", stage, *settings(stopped, 6, every=2), *changes)
    assert "resumes at step 4" in printed
    assert numbers(stopped) == numbers(whole)
    (abandoned,) = stopped.glob("metrics.abandoned-*.jsonl")
    assert [record["step"] for record in read_metrics(abandoned)] == [5]
    assert f"lines of steps 5 to 5, beyond step 4 where this run goes on, are now in {abandoned.name}" in printed
    starts = [json.loads(line) for line in (stopped / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 4]
    # `checkpoint.keep` is 2
    assert sorted(os.listdir(stopped / "checkpoints")) == ["latest", "step_00000004", "step_00000006"]


def test_extended_run_says_what_changed(project, trained, tmp_path):
    short = ("--set", "optimizer.schedule=constant", "--set", "optimizer.min_lr=0")
    project.run("train", "stage2", *settings(tmp_path, 2), *short)
    printed = project.run("train", "stage2", *settings(tmp_path, 4), *short)
    assert "resumes at step 2" in printed and "changed: train.steps: 2 -> 4" in printed
    assert len(numbers(tmp_path)) == 4
