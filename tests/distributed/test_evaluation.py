"""The same bits per byte and routing at every layout as in one process, on texts whose last windows are cut short."""

import dataclasses
import functools
import json

import pytest
from layouts import write_source

from megatron_lpr.evaluation.evaluate import plan_evaluation
from megatron_lpr.platform import leave_layout, megatron
from megatron_lpr.recipe.settings import ParallelConfig
from megatron_lpr.recipe.text_settings import EvaluationConfig, EvaluationCorpus
from megatron_lpr.testing.toy_models import write_toy_model, write_toy_text

# window 30: no multiple of what tensor- and context-parallel ranks share
LAYOUTS = {
    "dp2": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "ep2": {"expert": 2},
    "ep2_allgather": {"expert": 2, "dispatcher": "allgather"},
    "etp2": {"expert_tensor": 2},
    "cp2": {"context": 2},
    "tp2_ep2": {"tensor": 2, "expert": 2},
    "dp2_sharded": {"frozen": "sharded"},
    "tp2_ep2_sharded": {"tensor": 2, "expert": 2, "frozen": "sharded"},
}


def recipe_of(source, files, parallel):
    """Its corpora are long enough for several rounds, whose last one leaves ranks with nothing but padding."""
    corpora = tuple(
        EvaluationCorpus(name=name, files=(str(file),), language=name, role="original") for name, file in files.items()
    )
    recipe = plan_evaluation(source).recipe
    settings = EvaluationConfig(corpora=corpora, window=30, batch=2)
    return dataclasses.replace(recipe, evaluation=settings, parallel=ParallelConfig(**parallel))


def evaluated(source, files, parallel):
    """The result, on one rank of a layout."""
    return plan_evaluation(source, recipe_of(source, files, parallel)).run("x")


@pytest.fixture(scope="module")
def results(on_ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    base = write_toy_model(root / "base", num_hidden_layers=4)
    with megatron():
        source = write_source(base, root / "run")
        leave_layout()
    files = {"qaa": write_toy_text(root / "qaa.jsonl", "qaa", documents=3)}
    for name, text in {"qab": "one window", "qac": "a", "qad": "more than a window, and so a pass or two"}.items():
        files[name] = root / f"{name}.jsonl"
        files[name].write_text(json.dumps({"text": text}))
    return evaluated(source, files, {}), functools.partial(on_ranks, evaluated, 2, source, files)


@pytest.mark.parametrize("name", LAYOUTS)
def test_as_one_process(results, name):
    expected, on_two_ranks = results
    found, other = on_two_ranks(LAYOUTS[name])
    assert found == other
    for got, whole in zip(found.corpora, expected.corpora, strict=True):
        assert got == dataclasses.replace(whole, bits_per_byte=pytest.approx(whole.bits_per_byte, rel=1e-6))
    assert found.routing.keys() == expected.routing.keys() == {"qaa", "qab", "qac", "qad"}
    for corpus, shares in expected.routing.items():
        assert found.routing[corpus] == pytest.approx(shares, rel=1e-6) and len(shares) == 4
