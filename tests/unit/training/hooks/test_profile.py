"""A window of steps as a trace; and none without one."""

import gzip
import json

import pytest
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.reporting.metrics_log import TIMING, read_metrics


@pytest.fixture
def train(megatron, toy_base, tmp_path):
    """train(name, **logging): the traces in a run of four steps, by name, and what it logged."""

    def run(name, **logging):
        from megatron.core import parallel_state

        from megatron_lpr.training.train import Trainer

        parallel_state.destroy_model_parallel()
        sections = {"train": {"trainable": "routers", "steps": 4}, "logging": logging}
        recipe = make_recipe(toy_base, mixed_batch(), tmp_path / name, sections)
        Trainer(make_plan(recipe, mixed_batch())).run()
        traces = {path.name: path for path in (tmp_path / name).glob("profile/*")}
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        return traces, [{k: v for k, v in record.items() if k not in TIMING} for record in records]

    return run


def test_a_window_of_steps(train, capsys):
    traces, records = train("with", profile_from=2, profile_to=3)
    assert list(traces) == ["steps_2_to_3_rank_0.json.gz"]
    with gzip.open(traces["steps_2_to_3_rank_0.json.gz"]) as file:
        events = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert events.count("aten::mm") > 4 and "Optimizer.step#AdamW.step" in events
    assert "profile in" in capsys.readouterr().out
    traces, same_records = train("without")
    assert not traces and same_records == records
