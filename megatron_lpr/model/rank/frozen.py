"""Where the frozen weights of a run lie: a copy on every rank, or spread over ranks; and what a rank holds of them."""

from collections.abc import Iterable

from megatron_lpr.families import Architecture
from megatron_lpr.model.parameters import itemsize
from megatron_lpr.model.rank.casts import cast_bytes, has_no_other, layers_in_fp8
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.parameters import Parameter, parameters
from megatron_lpr.model.rank.place import Place
from megatron_lpr.model.rank.shards import held_elements
from megatron_lpr.recipe.settings import Recipe

# Bytes of frozen weights on a rank, above which `parallel.frozen: auto` shards them. So many copies take a fifth of an
# H100; fewer are cheaper than gathering every layer for every micro-batch (docs/layouts.md).
SHARDED_ABOVE = 16 << 30


def frozen_bytes(recipe: Recipe, arch: Architecture, world_size: int, *, sharded: bool = False) -> int:
    """Bytes of the frozen weights that a rank holds, the mean over pipeline stages.

    Where weights are held as nothing but their FP8 copies (`fp8.frozen_weights: fp8`), those of the copies.
    """
    stages = recipe.parallel.pipeline
    places = [Place(recipe.parallel, world_size, stage * (world_size // stages), sharded) for stage in range(stages)]
    return sum(_on_rank(recipe, arch, place) for place in places) // stages


def shards_frozen(recipe: Recipe, arch: Architecture, world_size: int) -> bool:
    """Whether the frozen weights are spread over ranks (parallel.frozen)."""
    if recipe.parallel.frozen != "auto":
        return recipe.parallel.frozen == "sharded"
    return world_size > recipe.parallel.pipeline and frozen_bytes(recipe, arch, world_size) > SHARDED_ABOVE


def uncast_bytes(recipe: Recipe, arch: Architecture, held: Iterable[Parameter], place: Place) -> int:
    """Of a rank's frozen weights, those that it holds in the dtype of the model."""
    in_fp8, dtype = layers_in_fp8(recipe, arch), recipe.model.dtype
    frozen = [p for p in held if not p.learns and not has_no_other(recipe, p, in_fp8)]
    return sum(held_elements(p, place) * itemsize(p.name, dtype) for p in frozen)


def _on_rank(recipe: Recipe, arch: Architecture, place: Place) -> int:
    held, in_fp8 = [p for chunk in parameters(recipe, arch, place) for p in chunk], layers_in_fp8(recipe, arch)
    total = uncast_bytes(recipe, arch, held, place)
    if recipe.train is not None:
        alone = [p for p in held if has_no_other(recipe, p, in_fp8)]
        total += cast_bytes(recipe, [alone], Layers(recipe, arch, place, recipe.train), arch)
    return total
