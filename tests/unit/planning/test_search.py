"""Which layouts are looked for."""

import dataclasses

import pytest

from megatron_lpr.families import read_architecture
from megatron_lpr.planning.hardware import gpu_named
from megatron_lpr.planning.search import search
from megatron_lpr.recipe.layout import layers_of_chunks
from megatron_lpr.recipe.reading import load_recipe

pytestmark = pytest.mark.slow


def found(layers, world_size, *changes, gigabytes=None, most=1000):
    """Sizes that fit, of Llama 3.1 70B with another number of layers."""
    base = "examples/plan/llama-3.1-70b"
    recipe = load_recipe("examples/recipes/stage1.yaml", [f"model.base={base}", *changes])
    arch = dataclasses.replace(read_architecture(base), num_layers=layers)
    return [layout.sizes for layout in search(recipe, arch, world_size, gpu_named("h100", gigabytes), most).best]


def test_stages_that_do_not_divide_the_layers_have_shorter_ends(root):
    """As the 126 layers of Llama 3.1 405B, for which nothing but one and two stages was tried, and nothing fitted."""
    sizes = found(13, 64, most=10)
    assert {(one.pipeline, one.first_stage_layers, one.last_stage_layers) for one in sizes} >= {(2, None, 6)}
    assert all(one.pipeline > 1 for one in sizes), "whole it does not fit"
    for one in sizes:
        layers = [len(chunk) for chunk in layers_of_chunks(one, 13)]
        assert sum(layers) == 13 and len(set(layers[1:-1])) <= 1


def test_stages_of_five_layers_have_five_chunks(root):
    """As those of 70B in 16 stages: neither two nor four divide them."""
    assert {one.virtual_pipeline for one in found(10, 64) if one.pipeline == 2} == {1, 5}
    assert {one.virtual_pipeline for one in found(12, 64) if one.pipeline == 2} == {1, 2}


def test_of_layouts_with_one_bound_the_least_memory_comes_first(root):
    """Of 70B on 512 GPUs the first had 0.2 GB to spare, where another had 21 with the same bound to two digits."""
    base = "examples/plan/llama-3.1-70b"
    recipe = load_recipe("examples/recipes/stage1.yaml", [f"model.base={base}"])
    best = search(recipe, read_architecture(base), 512, gpu_named("h100"), 10).best
    seconds = [layout.time.total for layout in best]
    alike = [layout for layout in best if layout.time.total <= 1.01 * min(seconds)]
    assert len(alike) > 1 and best[0].time.total > min(seconds)
    assert best[0].memory.total == min(layout.memory.total for layout in alike)
    assert seconds[len(alike) :] == sorted(seconds)[len(alike) :]


def test_the_layout_of_the_recipe_is_among_those_that_fit(root):
    """However odd: it fitted, and in the next line none did."""
    odd = ["parallel.pipeline=4", "parallel.first_stage_layers=1", "parallel.last_stage_layers=3"]
    assert (1, 3) in {(one.first_stage_layers, one.last_stage_layers) for one in found(8, 64, *odd)}


def test_experts_are_cut_where_nothing_fits_otherwise(root):
    assert {one.expert_tensor for one in found(4, 512)} == {1}
    assert {one.expert_tensor for one in found(4, 512, gigabytes=6)} == {2}
    assert {one.expert_tensor for one in found(4, 512, "parallel.expert_tensor=2")} == {2}


def test_each_layout_is_found_once(root):
    """The recipe's own too, where frozen weights must lie on the ranks once."""
    own = ["parallel.frozen=sharded", "parallel.tensor=2", "parallel.expert=8"]
    base = "examples/plan/llama-3.2-1b"
    recipe = load_recipe("examples/recipes/stage1.yaml", [f"model.base={base}", *own])
    sizes = [one.sizes for one in search(recipe, read_architecture(base), 8, gpu_named("h100", 20), 10).best]
    assert recipe.parallel in sizes and all(sizes.count(one) == 1 for one in sizes)
