"""What is held, by what a run trains and where its weights come from."""

import pytest
from fake_checkpoints import BASE, write_fake_checkpoint
from harness import make_recipe, mixed_batch

from megatron_lpr.checkpoint.holding import content_of, frozen_is_base, holds
from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.checkpoint.source import chain, find_source, source_identity
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.reading import to_tree

LAYER = "decoder.layers.3.mlp."
NAMES = {
    "router": f"{LAYER}router.weight",
    "new expert": f"{LAYER}experts.local_experts.0.linear_fc1.weight",
    "new expert of Transformer Engine": f"{LAYER}experts.linear_fc1.weight0",
    "frozen expert": f"{LAYER}frozen_experts.0.linear_fc1.weight",
    "dense FFN": f"{LAYER}linear_fc1.weight",
    "norm": "decoder.layers.3.pre_mlp_layernorm.weight",
    "embedding": "embedding.word_embeddings.weight",
}


@pytest.mark.parametrize(
    "content, number",
    [("over checkpoint", 1), ("over base", 3), ("whole", len(NAMES))],
)
def test_held_parameters(content, number):
    assert [holds(content, name) for name in NAMES.values()] == [True] * number + [False] * (len(NAMES) - number)


@pytest.fixture
def recipe_of(toy_base, tmp_path):
    def make(trainable="routers", *, dtype="float32", num_experts=4, whole=False):
        sections = {
            "train": {"trainable": trainable},
            "model": {"dtype": dtype, "num_experts": num_experts},
            "checkpoint": {"whole": whole},
        }
        return make_recipe(toy_base, mixed_batch(), tmp_path, sections)

    return make


@pytest.mark.parametrize(
    "trainable, frozen, on_checkpoint, finished, content",
    [
        ("new_experts_and_routers", True, False, False, "over base"),
        ("new_experts_and_routers", True, True, False, "over base"),
        ("new_experts_and_routers", False, True, False, "whole"),
        ("routers", True, True, False, "over checkpoint"),
        ("routers", False, True, False, "over checkpoint"),
        ("routers", True, False, False, "over base"),
        ("routers", True, True, True, "over base"),
        ("routers", False, True, True, "whole"),
        ("all", False, True, False, "whole"),
    ],
)
def test_content(recipe_of, trainable, frozen, on_checkpoint, finished, content):
    now = {"frozen_is_base": frozen, "on_checkpoint": on_checkpoint, "finished": finished}
    assert content_of(recipe_of(trainable), **now) == content
    assert content_of(recipe_of(trainable, whole=True), **now) == "whole"


FILES = {"files": {"model.safetensors": {"bytes": 1, "sha256": "0"}}}


def test_frozen_weights_are_the_bases_unless_somebody_has_trained_or_rounded_them(recipe_of):
    recipe = recipe_of()
    assert frozen_is_base(recipe, None, None, "float32")
    assert not frozen_is_base(recipe_of("all"), None, None, "float32")
    assert not frozen_is_base(recipe_of("all", num_experts=0), None, None, "float32")
    there = to_tree(recipe)
    assert frozen_is_base(recipe, there, FILES, "float32")
    assert not frozen_is_base(recipe, there, BASE, "float32")  # everything was trained


@pytest.mark.parametrize(
    "base, there, here, same",
    [
        ("float32", "float32", "bfloat16", True),
        ("bfloat16", "bfloat16", "float32", True),
        ("float32", "bfloat16", "bfloat16", True),
        ("float32", "bfloat16", "float32", False),
        ("float16", "bfloat16", "float32", False),
    ],
)
def test_rounding_on_the_way_shows(recipe_of, base, there, here, same):
    assert frozen_is_base(recipe_of(dtype=here), to_tree(recipe_of(dtype=there)), FILES, base) == same


def test_a_chain_leads_to_the_checkpoint_that_needs_no_other(recipe_of, tmp_path):
    recipe = to_tree(recipe_of())
    first = write_fake_checkpoint(tmp_path / "a", 1, recipe=recipe, content="over base")
    second = write_fake_checkpoint(
        tmp_path / "b", 2, recipe=recipe, content="over checkpoint", source=source_identity(first)
    )
    third = write_fake_checkpoint(
        tmp_path / "c", 3, recipe=recipe, content="over checkpoint", source=source_identity(second)
    )
    assert chain(first) == (first,) and chain(third) == (third, second, first)
    assert find_source(read_run_state(first)) is None
    moved = first.rename(tmp_path / "step_00000009")
    assert chain(second, str(moved)) == (second, moved)
    with pytest.raises(UserError, match=rf"^checkpoint {second}: holds routers only.*\(it was {first}, seen from /"):
        chain(third)
    write_fake_checkpoint(tmp_path / "a", 1, recipe=recipe, content="over base", tokens_per_language={"qaa": 1})
    with pytest.raises(UserError, match="is not there any more"):  # another one has its name
        chain(second)
