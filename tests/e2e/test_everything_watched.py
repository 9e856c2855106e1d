"""A run that is watched by all there is logs the same numbers, to the last digit, as one that nothing watches."""

import sys
from types import SimpleNamespace

import pytest

from megatron_lpr.reporting.metrics_log import TIMING, read_metrics

NOTHING = {"train.check_replicas_every": 0, "logging.stragglers_every": 0}
ALL = {
    "train.check_replicas_every": 1,
    "train.on_not_finite": "skip_and_mark",
    "train.max_skipped_steps": 3,
    "logging.stragglers_every": 1,
    "logging.wandb": "offline",
    "logging.profile_from": 2,
    "logging.profile_to": 3,
}


@pytest.fixture
def logged(monkeypatch):
    """What a stand-in for W&B gets."""
    data: list[dict] = []
    run = SimpleNamespace(log=data.append, define_metric=lambda *a, **k: None, finish=lambda exit_code: None)
    fake = SimpleNamespace(init=lambda **options: run, Settings=dict, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return data


def numbers(project, output, stage, settings):
    changes = {"output": output, "name": "test", **settings}
    project.run("train", stage, *(word for key, value in changes.items() for word in ("--set", f"{key}={value}")))
    records = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def test_the_same_to_the_last_digit(project, tmp_path, logged):
    watched = numbers(project, tmp_path / "watched", "stage1", ALL)
    assert watched == numbers(project, tmp_path / "plain", "stage1", NOTHING) and len(watched) == 6
    assert [data["step"] for data in logged] == [1, 2, 3, 4, 5, 6]
    assert [data["loss/ntp"] for data in logged] == [record["ntp_loss"] for record in watched]
    assert len(list((tmp_path / "watched/profile").iterdir())) == 1 and not (tmp_path / "plain/profile").exists()
