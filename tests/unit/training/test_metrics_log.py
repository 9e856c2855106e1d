"""JSONL and TensorBoard records, across resumes."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lpr.errors import UserError
from megatron_lpr.training.metrics_log import MetricsLog, read_metrics


def metrics(step, **changes):
    record = {
        "step": step,
        "steps": 10,
        "stage": "stage 1",
        "ntp_loss": 2.0 - step / 8,
        "balance_loss": 1.5,
        "lpr_loss": None,
        "grad_norm": 0.25,
        "lr": 0.5,
        "tokens": 64,
        "tokens_per_second": 32.0,
        "tokens_per_language": {"hu": 64 * step},
        "seconds": 2.0,
        "consumed_samples": 4 * step,
    }
    return record | changes


def write(folder, steps, *, resumed_step=0, **changes):
    with MetricsLog(folder, resumed_step=resumed_step) as log:
        for step in steps:
            log.write(metrics(step, **changes))


def scalars(folder):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]
    }


def test_records_are_read_back(tmp_path):
    write(tmp_path, [1, 2])
    assert read_metrics(tmp_path / "metrics.jsonl") == [metrics(1), metrics(2)]


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(metrics(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == metrics(1)
    log.close()


def test_resume_drops_steps_beyond_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4], balance_loss=1.5)
    write(tmp_path, [3, 4, 5], resumed_step=2, balance_loss=7.5)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["balance_loss"]) for record in records] == [
        (1, 1.5),
        (2, 1.5),
        (3, 7.5),
        (4, 7.5),
        (5, 7.5),
    ]
    assert scalars(tmp_path)["loss/balance"] == [(1, 1.5), (2, 1.5), (3, 7.5), (4, 7.5), (5, 7.5)]


def test_fresh_run_drops_everything(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1], stage="again")
    assert read_metrics(tmp_path / "metrics.jsonl") == [metrics(1, stage="again")]


def test_resume_after_a_torn_line(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3, "ntp_')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    write(tmp_path, [3], resumed_step=2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_broken_line_is_refused_and_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        MetricsLog(tmp_path, resumed_step=1)
    assert path.read_text() == '{"step": 1}\nnonsense\n'


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_number_that_is_not_finite_is_a_mistake(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.write(metrics(1, ntp_loss=float("nan")))


def test_tensorboard_scalars(tmp_path):
    router = {"frozen_share": [0.5, 0.25], "p0": [0.75, 0.125], "load": [[0.5, 0.5], [0.25, 0.75]]}
    with MetricsLog(tmp_path) as log:
        log.write(metrics(1, router={"hu": router}))
    assert scalars(tmp_path) == {
        "loss/ntp": [(1, 1.875)],
        "loss/balance": [(1, 1.5)],
        "optimizer/grad_norm": [(1, 0.25)],
        "optimizer/lr": [(1, 0.5)],
        "throughput/tokens_per_second": [(1, 32.0)],
        "throughput/seconds": [(1, 2.0)],
        "data/tokens_per_step": [(1, 64.0)],
        "data/consumed_samples": [(1, 4.0)],
        "tokens/hu": [(1, 64.0)],
        "router/frozen_share/hu/layer_00": [(1, 0.5)],
        "router/frozen_share/hu/layer_01": [(1, 0.25)],
        "router/p0/hu/layer_00": [(1, 0.75)],
        "router/p0/hu/layer_01": [(1, 0.125)],
        "router/load/hu/layer_00/expert_0": [(1, 0.5)],
        "router/load/hu/layer_00/expert_1": [(1, 0.5)],
        "router/load/hu/layer_01/expert_0": [(1, 0.25)],
        "router/load/hu/layer_01/expert_1": [(1, 0.75)],
    }
