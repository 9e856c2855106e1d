"""The search finds what trying every layout finds."""

import dataclasses

import pytest

from megatron_lpr.families import read_architecture
from megatron_lpr.planning import search
from megatron_lpr.planning.hardware import gpu_named
from megatron_lpr.planning.layout import Layouts
from megatron_lpr.recipe.reading import load_recipe


def case(base, gigabytes):
    recipe = load_recipe("examples/recipes/stage1.yaml", [f"model.base=examples/plan/{base}", "model.dtype=bfloat16"])
    return recipe, read_architecture(recipe.model.base), 2, gpu_named("h100", gigabytes)


def every_layout(recipe, arch, world_size, gpu):
    for sizes in search._sizes(recipe, arch, world_size, gpu):
        layouts = Layouts(dataclasses.replace(recipe, parallel=sizes), arch, world_size, gpu)
        for train in search.batches(layouts.recipe, arch, world_size):
            yield layouts, train


@pytest.mark.slow
@pytest.mark.parametrize("base, gigabytes", [("llama-3.2-1b", 25), ("qwen2.5-32b", 80)])
def test_where_nothing_fits_the_nearest_lacks_least(base, gigabytes, root):
    found = search.search(*case(base, gigabytes), most=3)
    least = min(layouts.memory(train)[0].total for layouts, train in every_layout(*case(base, gigabytes)))
    assert not found.best and found.nearest.memory.total == least


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3])
def test_what_is_passed_over_is_no_better(most, root):
    """A set of sizes with sharded weights is passed over where the same fits without: it is slower, if anything."""
    words = case("llama-3.2-1b", 80)
    gpu, seconds = words[-1], {}
    for layouts, train in every_layout(*words):
        if layouts.memory(train)[0].total <= gpu.usable:
            sizes = dataclasses.replace(layouts.recipe.parallel, frozen="replicated")
            seconds[sizes] = min(seconds.get(sizes, float("inf")), layouts.layout(train).time.total)
    found = [layout.time.total for layout in search.search(*words, most=most).best]
    assert found == pytest.approx(sorted(seconds.values())[:most], rel=1e-5)
