"""A run whose frozen weights are held in FP8 saves none of them, and is refused where it would have to."""

import dataclasses
import importlib.metadata

import pytest
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.errors import UserError
from megatron_lpr.training.base_scores import _key
from megatron_lpr.training.plan import _check_frozen_fp8

FP8 = {
    "model": {"num_experts": 5},
    "train": {"trainable": "new_experts_and_routers"},
    "fp8": {"recipe": "tensorwise", "frozen_weights": "fp8"},
}


def plan_of(toy_base, tmp_path, **sections):
    return make_plan(make_recipe(toy_base, mixed_batch(), tmp_path, FP8 | sections), mixed_batch())


def test_no_checkpoint_holds_them(toy_base, tmp_path):
    plan = plan_of(toy_base, tmp_path)
    _check_frozen_fp8(plan)
    assert plan.content(finished=True) == "over base"
    routers = plan_of(toy_base, tmp_path, train={"trainable": "routers"})
    assert {routers.content(finished=finished) for finished in (False, True)} == {"over checkpoint"}


def test_sharded_ones_need_one_scale(toy_base, tmp_path, monkeypatch):
    sharded = {"parallel": {"frozen": "sharded"}}
    _check_frozen_fp8(plan_of(toy_base, tmp_path, **sharded))
    blockwise = plan_of(toy_base, tmp_path, **sharded, fp8={"recipe": "blockwise", "frozen_weights": "fp8"})
    with pytest.raises(UserError, match="does not go with sharded .* whole blocks of rows.*; set parallel"):
        _check_frozen_fp8(blockwise)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.0")
    with pytest.raises(UserError, match="does not go with sharded .* Transformer Engine before 2.10"):
        _check_frozen_fp8(plan_of(toy_base, tmp_path, **sharded))
    _check_frozen_fp8(plan_of(toy_base, tmp_path))


def test_weights_that_are_not_the_bases_are_refused(toy_base, tmp_path, monkeypatch):
    plan = plan_of(toy_base, tmp_path)
    monkeypatch.setattr(type(plan), "frozen_is_base", False)
    with pytest.raises(UserError, match="which are not the base's; set bf16"):
        _check_frozen_fp8(plan)


def test_the_bases_scores_are_those_of_what_is_held(toy_base, tmp_path):
    """Retention compares like with like: a run in bfloat16 does not take them over."""
    plan = plan_of(toy_base, tmp_path)
    fp8 = dataclasses.replace(plan.recipe.fp8, frozen_weights="bf16")
    assert _key(plan) != _key(dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, fp8=fp8)))
