"""Which model is evaluated, and on which text."""

import dataclasses

import pytest
from toy_run import write_run

from megatron_lpr import cli
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.evaluate import plan_evaluation
from megatron_lpr.recipe.settings import ParallelConfig
from megatron_lpr.testing.toy_models import write_toy_text

HELD_OUT = {"name": "h", "files": ["h.jsonl"], "language": "qaa", "role": "expanded"}


def test_a_checkpoint_brings_its_recipe(toy_base, tmp_path):
    folder = write_run(toy_base, tmp_path / "run", recipe={"evaluation": {"corpora": [HELD_OUT]}})
    for path in (tmp_path / "run", folder):
        evaluation = plan_evaluation(path)
        assert evaluation.folder == folder and not evaluation.is_hf
        assert evaluation.recipe.evaluation.corpora[0].name == "h"
        assert evaluation.tokenizer_dir == str(toy_base)
    other = dataclasses.replace(evaluation.recipe, name="other")
    assert plan_evaluation(folder, other).recipe == other


def test_a_hugging_face_folder_needs_a_recipe(toy_base, tmp_path):
    with pytest.raises(UserError, match="is a Hugging Face model: name the recipe of the held-out text"):
        plan_evaluation(toy_base)
    recipe = plan_evaluation(write_run(toy_base, tmp_path / "run")).recipe
    evaluation = plan_evaluation(toy_base, recipe)
    assert evaluation.is_hf and evaluation.tokenizer_dir == str(toy_base)


def test_neither(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        plan_evaluation(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint there"):
        plan_evaluation(tmp_path)


LAYOUT = {"parallel": {"tensor": 2, "expert": 2}}


def test_several_ranks_have_the_layout_of_the_recipe_and_one_process_none(toy_base, tmp_path, monkeypatch):
    folder = write_run(toy_base, tmp_path / "run", recipe=LAYOUT)
    assert plan_evaluation(folder).recipe.parallel == ParallelConfig()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    evaluation = plan_evaluation(folder)
    assert (evaluation.recipe.parallel.tensor, evaluation.recipe.parallel.expert) == (2, 2)
    with pytest.raises(UserError, match="is a Hugging Face model, which is evaluated in one process, not in 4"):
        plan_evaluation(toy_base, evaluation.recipe)


def test_a_layout_that_does_not_fit(toy_base, tmp_path, monkeypatch):
    text = {"corpora": [HELD_OUT | {"files": [str(write_toy_text(tmp_path / "text.jsonl", "qaa"))]}], "window": 32}
    folder = write_run(toy_base, tmp_path / "run", recipe=LAYOUT | {"evaluation": text})
    plan_evaluation(folder).check()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="does not divide the number of ranks, 3"):
        plan_evaluation(folder).check()


def test_a_layout_for_one_process_has_no_effect(toy_base, tmp_path, capsys):
    folder = write_run(toy_base, tmp_path / "run")
    words = ["--name", "x", "--out", str(tmp_path / "x.json"), "--set", "parallel.tensor=2"]
    assert cli.main(["evaluate", str(folder), *words]) == 2
    assert "--set parallel.tensor=2: has no effect in one process" in capsys.readouterr().err
