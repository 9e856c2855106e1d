"""Which model is evaluated, and on which text."""

import dataclasses

import pytest
from toy_run import write_run

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.evaluate import plan_evaluation

HELD_OUT = {"name": "h", "files": ["h.jsonl"], "language": "qaa", "role": "expanded"}


def test_a_checkpoint_brings_its_recipe(toy_base, tmp_path):
    folder = write_run(toy_base, tmp_path / "run", recipe={"evaluation": {"corpora": [HELD_OUT]}})
    for path in (tmp_path / "run", folder):
        evaluation = plan_evaluation(path)
        assert evaluation.folder == folder and not evaluation.is_hf
        assert evaluation.recipe.evaluation.corpora[0].name == "h"
        assert evaluation.tokenizer_dir == str(toy_base)
    other = dataclasses.replace(evaluation.recipe, name="other")
    assert plan_evaluation(folder, other).recipe is other


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
