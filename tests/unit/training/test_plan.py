"""What a plan says: the resolved recipe, where it starts, what it reads, what a resumed run changes."""

import dataclasses

import pytest
import yaml
from harness import make_plan, make_recipe, mixed_batch
from safetensors.torch import load_file, save_file

from megatron_lpr import cli
from megatron_lpr.checkpoint.run_state import RunState
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.reading import load_recipe, to_tree
from megatron_lpr.testing.toy_models import write_toy_project
from megatron_lpr.training.plan import describe, plan_training


@pytest.fixture
def recipe(toy_base, tmp_path):
    return make_recipe(toy_base, mixed_batch(), tmp_path, {"train": {"steps": 3}})


@pytest.fixture
def plan(recipe):
    # the real sampler knows any number of samples, the fixed one those of a batch
    plan = make_plan(recipe, mixed_batch())
    plan.sampler.batch = type(plan.sampler.batch)(
        **{name: array.repeat(3, 0) for name, array in vars(plan.sampler.batch).items() if array is not None}
    )
    return plan


def test_description_is_the_recipe_and_what_it_comes_to(plan, recipe):
    text = describe(plan)
    resolved, _, summary = text.partition("\n\n")
    assert yaml.safe_load(resolved) == to_tree(recipe)
    assert f"base model {recipe.model.base}" in summary and "trains       all on 1 rank(s)" in summary
    assert "12 samples, 132 tokens in 3 steps: qaa 63, qab 21, qac 48" in summary


def test_description_names_the_checkpoint_it_starts_from(plan, tmp_path):
    assert f"checkpoint {tmp_path}" in describe(dataclasses.replace(plan, source=tmp_path))
    state = RunState(step=2, consumed_samples=8, has_optimizer=True, recipe={})
    resumed = dataclasses.replace(plan, resume=tmp_path, state=state)
    assert "step 2 of this run" in describe(resumed) and resumed.first_step == 2


def test_languages_of_the_plan(plan):
    assert plan.is_original == [False, True, True]


def test_description_of_a_finished_run(plan, tmp_path):
    state = RunState(step=3, consumed_samples=12, has_optimizer=True, recipe={})
    done = dataclasses.replace(plan, resume=tmp_path, state=state)
    assert done.finished and not plan.finished
    assert describe(done).startswith("nothing to do: the run in ") and "\n" not in describe(done)


def test_what_would_stop_a_fresh_run_stops_its_plan(tmp_path):
    path = str(write_toy_project(tmp_path)["stage1"])
    assert cli.main(["preprocess", path]) == 0
    fresh = ["model.load=null"]
    assert plan_training(load_recipe(path, fresh), 2).source is None
    (tmp_path / "file").touch()
    for output, expected in (("file/out", "cannot be made: .*file' is a file"), ("base/out", "lies in .*base'")):
        with pytest.raises(UserError, match=f"output folder .*{expected}"):
            plan_training(load_recipe(path, [*fresh, f"output={tmp_path}/{output}"]), 2)
    weights = tmp_path / "base/model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight"):
        plan_training(load_recipe(path, fresh), 2)
