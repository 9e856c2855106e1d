"""What a resumed run may change, what makes it another one, and what is remembered of where it came from."""

import dataclasses
import json
import shutil

import pytest
from fake_checkpoints import BASE, write_fake_checkpoint
from harness import make_recipe, mixed_batch
from tiny_models import rewrite

from megatron_lpr.checkpoint.run_state import RunState, read_run_state
from megatron_lpr.checkpoint.same_run import (
    base_identity,
    changed_settings,
    check_resumed,
    check_source,
    resumed_state,
    rounded,
)
from megatron_lpr.checkpoint.source import source_identity
from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.reading import from_tree, to_tree
from megatron_lpr.recipe.settings import Recipe

DATA = {"version": 3, "consumed_samples": 8, "schedule": [], "corpora": {}}


@pytest.fixture
def recipe(toy_base, tmp_path):
    return make_recipe(toy_base, mixed_batch(), tmp_path / "run", {"train": {"steps": 3}})


@pytest.fixture
def base(toy_base):
    return base_identity(toy_base, read_architecture(toy_base))


def changed(recipe, **values):
    """changed(recipe, model__topk=3): the same recipe with other settings."""
    tree = to_tree(recipe)
    for key, value in values.items():
        *sections, field = key.split("__")
        section = tree[sections[0]] if sections else tree
        section[field] = value
    return from_tree(Recipe, tree, where="test")


def state_of(recipe, step=1, **fields) -> RunState:
    fields = {"consumed_samples": 4 * step, "has_optimizer": True, "base": BASE} | fields
    state = RunState(step=step, recipe=to_tree(recipe), **fields)
    return RunState(**json.loads(json.dumps(state.__dict__)))


def test_the_same_recipe_goes_on(recipe, base):
    check_resumed(recipe, state_of(recipe, base=base), base)


@pytest.mark.parametrize(
    "fields, name, what",
    [
        ({}, "step_00000003", "step is 2, and must be 3"),
        ({"consumed_samples": 7}, "step_00000002", "consumed_samples is 7, and must be 8"),
        (
            {"data_state": DATA | {"consumed_samples": 12}},
            "step_00000002",
            "data_state.consumed_samples is 12, and must be 8",
        ),
    ],
)
def test_a_run_does_not_go_on_at_another_place_than_it_was(recipe, tmp_path, fields, name, what):
    good = {"recipe": to_tree(recipe), "consumed_samples": 8, "data_state": DATA}
    assert resumed_state(write_fake_checkpoint(tmp_path / "good", 2, **good)).step == 2
    folder = write_fake_checkpoint(tmp_path, 2, **good | fields)
    folder = folder.rename(tmp_path / name)
    with pytest.raises(UserError, match=rf"run.json is damaged \({what}\); put it back, or let .*latest name another"):
        resumed_state(folder)


FREE = {
    "train__steps": 9,
    "train__micro_batch_size": 1,
    "train__recompute": "full",
    "optimizer__lr": 1e-3,
    "optimizer__schedule": "linear",
    "parallel__tensor": 2,
    "parallel__distributed_optimizer": False,
    "checkpoint__keep": 9,
    "logging__router_every": 7,
    "data__read_ahead": 0,
    "name": "other",
}
FIXED = {
    "model__num_experts": 5,
    "model__num_frozen_experts": 2,
    "model__topk": 1,
    "model__mlp_only_layers": [1],
    "model__dtype": "bfloat16",
    "model__router_init_std": 0.1,
    "model__router_init_seed": 1,
    "train__trainable": "routers",
    "train__global_batch_size": 8,
    "balance__coeff": 0.5,
    "balance__group": "micro_batch",
    "lpr__coeff": 0.5,
    "lpr__loss": "double_softmax",
    "data__reset_attention": True,
}


@pytest.mark.parametrize("key", FREE)
def test_may_change(recipe, base, key):
    check_resumed(changed(recipe, **{key: FREE[key]}), state_of(recipe, base=base), base)


@pytest.mark.parametrize("key", FIXED)
@pytest.mark.parametrize("step", [1, 3], ids=["on the way", "finished"])
def test_may_not_change(recipe, base, key, step):
    new, old = FIXED[key], to_tree(recipe)
    section, field = key.split("__")
    with pytest.raises(UserError) as refused:
        check_resumed(changed(recipe, **{key: new}), state_of(recipe, step, base=base), base)
    sentence = str(refused.value)
    assert sentence.startswith(f"{section}.{field}: {new}, but the run in {recipe.output} ")
    assert str(old[section][field]) in sentence and "\n" not in sentence
    # weights of another model would be refused there too
    assert ("model.load takes the weights" in sentence) == (section != "model" or field == "dtype")


def test_every_setting_of_the_model_is_judged(recipe):
    """A new one must be put on one side or the other."""
    judged = {key.removeprefix("model__") for key in FIXED if key.startswith("model__")}
    assert {field.name for field in dataclasses.fields(recipe.model)} - judged == {
        "base",
        "load",
        "spec",
        "fused_kernels",
    }


def test_micro_batches_are_the_groups_of_a_balance_loss(recipe, base):
    grouped = changed(recipe, balance__coeff=0.1, balance__group="micro_batch")
    with pytest.raises(UserError, match="train.micro_batch_size: 1, but"):
        check_resumed(changed(grouped, train__micro_batch_size=1), state_of(grouped), base)
    no_loss = changed(grouped, balance__coeff=0.0)
    check_resumed(changed(no_loss, train__micro_batch_size=1), state_of(no_loss, base=base), base)


def test_a_finished_run_cannot_have_learnt_otherwise(recipe, base):
    state = state_of(recipe, step=3, has_optimizer=False)
    check_resumed(changed(recipe, checkpoint__keep=5, parallel__tensor=2), state, base)
    with pytest.raises(UserError, match="optimizer.lr: 0.001, but .* has 5e-05"):
        check_resumed(changed(recipe, optimizer__lr=1e-3), state, base)
    with pytest.raises(UserError, match="ended at step 3 without optimizer state"):
        check_resumed(changed(recipe, train__steps=4), state, base)
    with pytest.raises(UserError, match="train.steps: 2, but the run in .* has made 3 already"):
        check_resumed(changed(recipe, train__steps=2), state, base)


def test_a_converted_model_is_no_run(recipe, base):
    state = state_of(dataclasses.replace(recipe, train=None, data=None), step=0, has_optimizer=False)
    with pytest.raises(UserError, match="holds a converted model, not a training run; .*model.load"):
        check_resumed(recipe, state, base)


def test_settings_that_an_older_version_did_not_have(recipe, base):
    state = state_of(recipe)
    del state.recipe["model"]["router_init_seed"], state.recipe["lpr"]
    check_resumed(recipe, state, base)


def test_changed_settings(recipe):
    old = state_of(recipe)
    assert changed_settings(recipe, old) == []
    new = changed(recipe, train__steps=9, optimizer__lr=1.0)
    assert changed_settings(new, old) == ["train.steps: 3 -> 9", "optimizer.lr: 5e-05 -> 1.0"]


def test_a_setting_that_an_older_run_did_not_have_was_what_is_the_default_now(recipe):
    old = state_of(recipe)
    del old.recipe["data"]["read_ahead"], old.recipe["logging"]
    assert changed_settings(recipe, old) == []
    assert changed_settings(changed(recipe, data__read_ahead=0), old) == ["data.read_ahead: 2 -> 0"]


def test_settings_that_are_gone_do_not_hide_what_has_changed(recipe):
    old = state_of(recipe)
    old.recipe["train"]["no_longer_there"] = 1
    assert changed_settings(changed(recipe, train__steps=9), old) == ["train.steps: 3 -> 9"]


def test_a_base_model_is_known_wherever_it_lies(recipe, base, toy_base, tmp_path):
    moved = shutil.copytree(toy_base, tmp_path / "moved")
    assert base_identity(moved, read_architecture(moved)) == base
    (moved / "model.safetensors").unlink()  # a run that resumes does not read it
    without = base_identity(moved, read_architecture(moved))
    check_resumed(changed(recipe, model__base=str(moved)), state_of(recipe, base=base), without)


def test_another_base_model_is_refused(recipe, base, toy_base, tmp_path):
    other = shutil.copytree(toy_base, tmp_path / "other")
    rewrite(other, lambda tensors: tensors[max(tensors)].mul_(1.5))
    weights = base_identity(other, read_architecture(other))
    arch = dataclasses.replace(read_architecture(toy_base), rope_theta=5.0)
    other_config = base_identity(toy_base, arch)
    both = other_config | {"weights": weights["weights"]}
    for there, what in ((weights, "other weights"), (other_config, "rope_theta 5.0 for "), (both, "0, other weights")):
        with pytest.raises(UserError, match=f"model.base: .* is another model than the base of the run .*{what}"):
            check_resumed(recipe, state_of(recipe, base=base), there)
        folder = write_fake_checkpoint(tmp_path / what, 1, base=base, recipe=to_tree(recipe))
        with pytest.raises(UserError, match=f"another model than the base of the checkpoint .*{what}"):
            check_source(recipe, folder, there)


def test_a_base_with_another_tokenizer_is_refused_where_the_run_names_its_own(recipe, base):
    other = base | {"tokenizer": "f" * 64}
    assert base["tokenizer"] and base["tokenizer"] != other["tokenizer"]
    with pytest.raises(UserError, match=r"model.base: .* is another model than the base .*\(another tokenizer\)"):
        check_resumed(recipe, state_of(recipe, base=base), other)
    check_resumed(recipe, state_of(recipe, base=base | {"tokenizer": None}), other)


@pytest.mark.parametrize("key", ["model__num_experts", "model__num_frozen_experts", "model__topk"])
def test_source_of_another_model(recipe, base, tmp_path, key):
    folder = write_fake_checkpoint(tmp_path, 1, base=base, recipe=to_tree(recipe))
    check_source(changed(recipe, train__trainable="routers", lpr__coeff=0.1), folder, base)
    with pytest.raises(
        UserError, match=f"{key.replace('__', '.')}: {FIXED[key]}, but the checkpoint {folder} has "
    ) as e:
        check_source(changed(recipe, **{key: FIXED[key]}), folder, base)
    # another output folder would not help
    assert "or name another checkpoint in model.load" in str(e.value) and "output" not in str(e.value)


@pytest.mark.parametrize("key", ["router_init_std", "router_init_seed"])
def test_routers_of_a_source_are_not_made_anew(recipe, base, tmp_path, key):
    folder, new = write_fake_checkpoint(tmp_path, 1, base=base, recipe=to_tree(recipe)), FIXED[f"model__{key}"]
    with pytest.raises(UserError, match=f"model.{key}: {new} has no effect on the checkpoint {folder}, whose routers"):
        check_source(changed(recipe, **{f"model__{key}": new}), folder, base)
    older = to_tree(recipe)
    del older["model"][key]  # a version that had no such setting
    folder = write_fake_checkpoint(tmp_path / "older", 1, base=base, recipe=older)
    check_source(changed(recipe, **{f"model__{key}": new}), folder, base)
    dense = changed(recipe, model__num_experts=0)  # has none
    folder = write_fake_checkpoint(tmp_path / "dense", 1, base=base, recipe=to_tree(dense))
    check_source(changed(dense, **{f"model__{key}": new}), folder, base)


def test_weights_that_lose_digits_are_told(recipe, tmp_path):
    folder = write_fake_checkpoint(tmp_path, 1, recipe=to_tree(recipe))
    assert rounded(recipe, folder) is None
    assert "rounds the float32 weights" in rounded(changed(recipe, model__dtype="bfloat16"), folder)


def test_the_source_may_go_or_move_but_not_be_another(recipe, base, tmp_path):
    source = write_fake_checkpoint(tmp_path / "stage1/checkpoints", 6, tokens_per_language={"qaa": 5, "qab": 6})
    loaded = changed(recipe, model__load=str(source))
    state = state_of(loaded, base=base, source=source_identity(source))
    assert state.source["tokens"] == 11
    moved = source.rename(tmp_path / "moved")
    check_resumed(loaded, state, base)
    check_resumed(changed(recipe, model__load=str(moved)), state, base)
    write_fake_checkpoint(tmp_path / "other", 6)
    for load in (None, str(tmp_path / "other/step_00000006")):
        with pytest.raises(
            UserError, match=f"model.load: {load or 'not set'}, but the run in .* from {source}; restore it"
        ):
            check_resumed(changed(recipe, model__load=load), state, base)
    with pytest.raises(UserError, match="no such folder"):
        check_resumed(changed(recipe, model__load="nowhere"), state, base)
    with pytest.raises(UserError, match="started from the base model"):
        check_resumed(loaded, state_of(recipe, base=base), base)


def test_identity_survives_run_json(recipe, base, tmp_path):
    folder = write_fake_checkpoint(tmp_path, 1, base=base, recipe=to_tree(recipe))
    assert read_run_state(folder).base == json.loads(json.dumps(base))
    check_source(recipe, folder, base)
