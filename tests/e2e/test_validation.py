"""Held-out text during training: what is logged is what `evaluate` says, and the run is the same without it."""

import json
import shutil

import pytest

from megatron_lpr.api import evaluate
from megatron_lpr.commands.status import _lines
from megatron_lpr.evaluation.retention import bits_per_language, retention
from megatron_lpr.recipe.reading import load_recipe
from megatron_lpr.reporting.metrics_log import TIMING, read_metrics
from megatron_lpr.testing.equal_runs import differences
from megatron_lpr.training.base_scores import FILE
from megatron_lpr.training.run_status import run_status


def train(project, stage, output, *settings):
    changes = [f"output={output}", "checkpoint.every=2", "checkpoint.keep=0", *settings]
    return project.run("train", stage, *(word for change in changes for word in ("--set", change)))


def validations(output):
    return {r["step"]: r["validation"] for r in read_metrics(output / "metrics.jsonl") if "validation" in r}


@pytest.fixture(scope="module")
def runs(project, tmp_path_factory):
    """Stage 1 with and without, and what the first printed."""
    root = tmp_path_factory.mktemp("validation")
    printed = train(project, "stage1", root / "with", "evaluation.every=4")
    train(project, "stage1", root / "without")
    return root, printed


def numbers(output):
    own = TIMING | {"validation"}
    return [{k: v for k, v in record.items() if k not in own} for record in read_metrics(output / "metrics.jsonl")]


def test_the_run_is_the_same_to_the_last_bit(runs):
    root, _ = runs
    assert numbers(root / "with") == numbers(root / "without") and len(numbers(root / "with")) == 6
    assert not differences(root / "with", root / "without")


def test_it_says_what_evaluate_says(project, runs):
    root, printed = runs
    recipe = load_recipe(str(project.recipes["stage1"]))
    base = evaluate(project.root / "base", recipe=recipe, name="base")
    logged = validations(root / "with")
    assert list(logged) == [4, 6]
    for step, found in logged.items():
        result = evaluate(root / f"with/checkpoints/step_{step:08d}")
        assert found["bits_per_byte"] == pytest.approx(bits_per_language(result.corpora), rel=1e-6)
        assert found["retention"] == pytest.approx(retention(base, result), rel=1e-5)
        assert found["retention"].keys() == {"qab", "qac"}
    status = run_status(str(root / "with"))
    assert status.validation == {"step": 6, **logged[6]}
    assert any(line.startswith("  held out") and "after step 6" in line for line in _lines(status))
    assert printed.count("held out qaa ") == 2 and "% kept)" in printed


def test_stage_2_takes_the_base_from_stage_1(project, runs, tmp_path):
    root, _ = runs
    stage1 = shutil.copytree(root / "with", tmp_path / "stage1")
    load = f"model.load={stage1}"
    train(project, "stage2", tmp_path / "measured", load, "evaluation.every=6", "evaluation.window=31")  # another key
    record = json.loads((stage1 / FILE).read_text())
    for corpus in record["corpora"]:
        corpus["bits_per_byte"] *= 2
    (stage1 / FILE).write_text(json.dumps(record))
    train(project, "stage2", tmp_path / "taken", load, "evaluation.every=6")
    measured, taken = (validations(tmp_path / name)[6]["retention"] for name in ("measured", "taken"))
    assert taken == pytest.approx({language: 2 * percent for language, percent in measured.items()}, rel=0.01)
    assert json.loads((tmp_path / "taken" / FILE).read_text()) == record
    # a resumed run has its own
    (stage1 / FILE).unlink()
    (tmp_path / "taken/checkpoints/latest").write_text("step_00000002")
    train(project, "stage2", tmp_path / "taken", load, "evaluation.every=6")
    assert validations(tmp_path / "taken")[6]["retention"] == taken


def test_a_run_whose_base_is_out_of_reach(project, tmp_path, capsys):
    """`moe_full` has no frozen weight: once it has learnt, nothing in it is the base."""
    train(project, "moe_full", tmp_path / "run", "train.steps=2")
    train(project, "moe_full", tmp_path / "run", "train.steps=4", "evaluation.every=2")
    assert "no retention is logged" in capsys.readouterr().err
    assert validations(tmp_path / "run")[4].keys() == {"bits_per_byte"}
    train(project, "moe_full", tmp_path / "other", "train.steps=2", "evaluation.every=2")
    assert validations(tmp_path / "other")[2].keys() == {"bits_per_byte", "retention"}
