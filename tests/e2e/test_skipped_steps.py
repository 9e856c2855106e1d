"""A step that is not finite is skipped, its data marked, and a run that was stopped after it goes on bit for bit."""

import json
import re

import pytest

from megatron_lpr.reporting.metrics_log import TIMING, read_metrics

BAD_STEPS = {1, 3}


class Interrupted(Exception):
    """What ends a run in the middle of a step."""


@pytest.fixture
def bad_data(monkeypatch):
    """The losses of some steps are NaN, at every attempt; a dict whose `stop_before` ends the run before that step."""
    from megatron_lpr.training import step as module
    from megatron_lpr.training.train import Trainer

    now: dict = {"stop_before": None}
    take, loss = Trainer.train_step, module.next_token_loss

    def train_step(trainer):
        now["step"] = trainer.step + 1
        if now["step"] == now["stop_before"]:
            raise Interrupted
        return take(trainer)

    def next_token_loss(*arguments):
        return loss(*arguments) * (float("nan") if now["step"] in BAD_STEPS else 1.0)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(module, "next_token_loss", next_token_loss)
    return now


def settings(output, limit):
    changes = {"output": output, "checkpoint.every": 1, "train.on_not_finite": "skip_and_mark"}
    changes |= {"train.max_skipped_steps": limit, "name": "test"}
    return [argument for key, value in changes.items() for argument in ("--set", f"{key}={value}")]


def numbers(folder):
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_metrics(folder / "metrics.jsonl")]


def marked(folder):
    return [json.loads(line) for line in (folder / "marked.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_before", [2, 5])
def test_resumes_bit_for_bit_across_skipped_steps(project, tmp_path, bad_data, stop_before):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    project.run("train", "stage1", *settings(whole, 2))
    records = numbers(whole)
    assert [record["step"] for record in records if "skipped" in record] == [1, 3]
    assert [record["skipped_steps"] for record in records] == [1, 1, 2, 2, 2, 2]
    assert records[0]["ntp_loss"] is None and records[1]["ntp_loss"] > 0
    bad_data["stop_before"] = stop_before
    with pytest.raises(Interrupted):
        project.run("train", "stage1", *settings(stopped, 2))
    bad_data["stop_before"] = None
    assert f"resumes at step {stop_before - 1}" in project.run("train", "stage1", *settings(stopped, 2))
    assert numbers(stopped) == records and marked(stopped) == marked(whole)
    shown = "".join(project.run("inspect-data", "stage1", "--step", step) for step in sorted(BAD_STEPS))
    places = re.findall(r"document ([\d,]+), tokens ([\d,]+) to", shown)
    found = [(f"{place['document']:,}", f"{place['first_token']:,}") for place in marked(whole)]
    assert found == places and {place["step"] for place in marked(whole)} == BAD_STEPS
