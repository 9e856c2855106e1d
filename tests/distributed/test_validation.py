"""Held-out text during training at several layouts: the numbers of one process, and a run that is not changed by it."""

import dataclasses

import pytest
from harness import make_plan
from layouts import recipe_of, unfair_batch

from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.evaluation.windows import tokenized
from megatron_lpr.platform import megatron
from megatron_lpr.recipe.text_settings import EvaluationCorpus
from megatron_lpr.reporting.metrics_log import TIMING, read_metrics
from megatron_lpr.testing.toy_models import write_toy_model

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "dp2_overlap": OVERLAP,
    "tp2_ep2_sharded": {"tensor": 2, "expert": 2, "frozen": "sharded"},
    "pp2_vpp2_overlap": {"pipeline": 2, "virtual_pipeline": 2} | OVERLAP,
    "cp2": {"context": 2},
}
DOCUMENTS = {"qaa": ["a text of some length, in several windows", "and another one"], "qab": ["short"]}


def texts(base):
    tokenizer, roles = load_tokenizer(str(base)), {"qaa": "expanded", "qab": "original"}
    return tuple(
        tokenized(
            tokenizer, EvaluationCorpus(name=name, files=("x",), language=name, role=roles[name]), DOCUMENTS[name]
        )
        for name in DOCUMENTS
    )


def records(base, output, parallel, every, world_size):
    """The metrics of a run of three steps, on one of its ranks."""
    changes = {
        "parallel": parallel,
        "train": {"steps": 3, "recompute": "full"},
        "evaluation": {"every": every, "window": 14, "batch": 2},
    }
    with megatron():
        from megatron_lpr.training.train import Trainer

        recipe = recipe_of(base, "stage1", output, changes)
        plan = make_plan(recipe, unfair_batch(), world_size=world_size)
        Trainer(dataclasses.replace(plan, held_out=texts(base) if every else ())).run()
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_metrics(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("validation") / "base", num_hidden_layers=4)


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory):
    found = records(base, tmp_path_factory.mktemp("one") / "run", {}, 2, 1)
    return [record.get("validation") for record in found]


@pytest.mark.parametrize("name", LAYOUTS)
def test_as_one_process_and_without_a_trace(on_ranks, base, expected, tmp_path, name):
    validated, _ = on_ranks(records, 2, base, tmp_path / "with", LAYOUTS[name], 2, 2)
    found = [record.pop("validation", None) for record in validated]
    assert [one is None for one in found] == [one is None for one in expected] == [True, False, False]
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-5)
        assert one["retention"] == pytest.approx(other["retention"], rel=1e-5) and one["retention"].keys() == {"qab"}
        assert abs(one["retention"]["qab"] - 100) > 0.01  # three steps have changed something
    plain, _ = on_ranks(records, 2, base, tmp_path / "without", LAYOUTS[name], 0, 2)
    assert validated == plain
