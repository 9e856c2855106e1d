"""JSONL and TensorBoard records, across resumes."""

import json
import re
from contextlib import closing

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lpr.errors import UserError
from megatron_lpr.reporting import metrics_log
from megatron_lpr.reporting.metrics_log import MetricsLog, read_metrics

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def metrics(step, **changes):
    record = {
        "step": step,
        "steps": 10,
        "stage": "stage 1",
        "ntp_loss": 2.0 - step / 8,
        "ntp_loss_per_language": {"hu": 2.0 - step / 8},
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
    with closing(MetricsLog(folder, resumed_step=resumed_step)) as log:
        for step in steps:
            log.write(metrics(step, **changes))
    return log.moved


def read(path):
    """Records without their time, whose form is checked."""
    records = read_metrics(path)
    assert all(TIME.fullmatch(record.pop("time")) for record in records)
    return records


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def aside(folder):
    """The files of abandoned steps."""
    return sorted(folder.glob("metrics.abandoned-*.jsonl"))


def scalars(folder):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_records_are_read_back_and_have_a_time(tmp_path):
    write(tmp_path, [1, 2])
    assert read(tmp_path / "metrics.jsonl") == [metrics(1), metrics(2)]


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(metrics(1))
    assert read(tmp_path / "metrics.jsonl") == [metrics(1)]
    log.close()


def test_records_without_the_keys_of_today_are_read(tmp_path):
    old = metrics(1)
    del old["ntp_loss_per_language"]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    write(tmp_path, [2], resumed_step=1)
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == old and steps_of(tmp_path / "metrics.jsonl") == [1, 2]


def test_resuming_moves_steps_beyond_the_checkpoint_aside(tmp_path):
    write(tmp_path, [1, 2, 3, 4], balance_loss=1.5)
    moved = write(tmp_path, [3, 4, 5], resumed_step=2, balance_loss=7.5)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["balance_loss"]) for record in records] == [
        (1, 1.5),
        (2, 1.5),
        (3, 7.5),
        (4, 7.5),
        (5, 7.5),
    ]
    assert scalars(tmp_path)["loss/balance"] == [(1, 1.5), (2, 1.5), (3, 7.5), (4, 7.5), (5, 7.5)]
    (file,) = aside(tmp_path)
    assert read(file) == [metrics(3, balance_loss=1.5), metrics(4, balance_loss=1.5)]
    assert f"lines of steps 3 to 4, beyond step 2 where this run goes on, are now in {file.name}" in moved


def test_nothing_is_moved_where_nothing_is_beyond(tmp_path):
    write(tmp_path, [1, 2])
    assert write(tmp_path, [3], resumed_step=2) is None and not aside(tmp_path)


def test_fresh_run_moves_everything_aside(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1], stage="again")
    write(tmp_path, [1], stage="and again")
    assert read(tmp_path / "metrics.jsonl") == [metrics(1, stage="and again")]
    assert [read(file) for file in aside(tmp_path)] == [[metrics(1), metrics(2)], [metrics(1, stage="again")]]


def test_the_file_of_another_run_is_never_replaced(tmp_path):
    """Two runs in one folder, which the lock of the folder prevents: the first one's lines still are somewhere."""
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(tmp_path)
    first.write(metrics(1, stage="first"))
    with closing(MetricsLog(tmp_path)) as second:
        first.write(metrics(2, stage="first"))
        second.write(metrics(1, stage="second"))
        first.write(metrics(3, stage="first"))
    first.close()
    assert [(record["step"], record["stage"]) for record in read(path)] == [(2, "first"), (1, "second"), (3, "first")]
    assert [record["step"] for file in aside(tmp_path) for record in read(file)] == [1]


def test_resume_after_a_torn_line(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3, "ntp_')
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2]
    assert write(tmp_path, [3], resumed_step=2) is None
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3] and not aside(tmp_path)


@pytest.mark.parametrize("damage", [b"\0" * 512 + b"\n", b"nonsense\n", b"[1]\n", b'{"step": null}\n', b"\xff\n"])
def test_a_damaged_end_is_moved_aside_and_stops_no_run(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [1, 2])
    with path.open("ab") as out:
        out.write(damage)
    assert "lines that cannot be read" in write(tmp_path, [3], resumed_step=2)
    assert steps_of(path) == [1, 2, 3]
    assert [file.read_bytes() for file in aside(tmp_path)] == [damage]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    write(tmp_path, [4], resumed_step=3)
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        read_metrics(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_numbers_that_are_not_finite_are_null(tmp_path):
    nan, infinite = float("nan"), float("inf")
    write(tmp_path, [1], ntp_loss=nan, tokens_per_language={"hu": 1, "en": -infinite}, lr=infinite)
    expected = metrics(1, ntp_loss=None, tokens_per_language={"hu": 1, "en": None}, lr=None)
    assert read(tmp_path / "metrics.jsonl") == [expected]


def test_tensorboard_scalars(tmp_path):
    router = {"frozen_share": [0.5, 0.25], "p0": [0.75, 0.125], "load": [[0.5, 0.5], [0.25, 0.75]]}
    summary = {"frozen_share": {"mean": 0.375, "min": 0.25, "max": 0.5}, "busiest_expert": {"mean": 1.25}}
    with closing(MetricsLog(tmp_path)) as log:
        validation = {"bits_per_byte": {"hu": 1.5, "en": 1.25}, "retention": {"en": 99.0}}
        log.write(metrics(1, router={"hu": router}, router_summary={"hu": summary}, validation=validation))
    assert scalars(tmp_path) == {
        "loss/ntp": [(1, 1.875)],
        "loss/balance": [(1, 1.5)],
        "loss_per_language/hu": [(1, 1.875)],
        "optimizer/grad_norm": [(1, 0.25)],
        "optimizer/lr": [(1, 0.5)],
        "throughput/tokens_per_second": [(1, 32.0)],
        "throughput/seconds": [(1, 2.0)],
        "data/tokens_per_step": [(1, 64.0)],
        "data/consumed_samples": [(1, 4.0)],
        "tokens/hu": [(1, 64.0)],
        "validation/bits_per_byte/hu": [(1, 1.5)],
        "validation/bits_per_byte/en": [(1, 1.25)],
        "validation/retention/en": [(1, 99.0)],
        "router_summary/frozen_share/hu/mean": [(1, 0.375)],
        "router_summary/frozen_share/hu/min": [(1, 0.25)],
        "router_summary/frozen_share/hu/max": [(1, 0.5)],
        "router_summary/busiest_expert/hu/mean": [(1, 1.25)],
        "router/frozen_share/hu/layer_00": [(1, 0.5)],
        "router/frozen_share/hu/layer_01": [(1, 0.25)],
        "router/p0/hu/layer_00": [(1, 0.75)],
        "router/p0/hu/layer_01": [(1, 0.125)],
        "router/load/hu/layer_00/expert_0": [(1, 0.5)],
        "router/load/hu/layer_00/expert_1": [(1, 0.5)],
        "router/load/hu/layer_01/expert_0": [(1, 0.25)],
        "router/load/hu/layer_01/expert_1": [(1, 0.75)],
    }


@pytest.mark.parametrize(("languages", "experts", "kinds"), [(2, 4, 3), (20, 300, 2), (300, 300, 0)])
def test_tensorboard_gets_no_more_of_layers_and_experts_than_anyone_can_look_at(languages, experts, kinds):
    layers = 40
    of_one = {"frozen_share": [0.5] * layers, "p0": [0.5] * layers, "load": [[1 / experts] * experts] * layers}
    router = {f"l{number}": of_one for number in range(languages)}
    tags = [tag.split("/")[1] for tag, _ in metrics_log.scalars(metrics(1, router=router)) if tag.startswith("router/")]
    assert len(set(tags)) == kinds and len(tags) <= 2 * metrics_log.MOST_LAYER_SCALARS
    assert tags.count("p0") in (0, layers * languages)
