"""FP8 copies of weights, which the linear layers multiply by: one byte of each number, and another of it transposed.

The second is what a gradient of the layer's input reads: nothing of it is there where nothing below learns, but of a
linear layer with the norm before it, which casts both ways whatever is asked, unless the copy is all there is. They
stay from step to step; those of frozen weights are all that there is of these with `fp8.frozen_weights: fp8`. A sharded
weight is cast whenever it is gathered, and its copy does not stay; what it is instead with `fp8.frozen_weights: fp8`,
the rows of a rank, has nothing transposed.
"""

from collections.abc import Sequence

from megatron_lpr.families import Architecture
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.parameters import Parameter
from megatron_lpr.model.rank.shards import held_elements, is_spread
from megatron_lpr.recipe.settings import Recipe

_BLOCK = 128
FP8 = 1  # bytes of a number
_SCALE = 4  # bytes


def layers_in_fp8(recipe: Recipe, arch: Architecture) -> range:
    """Of the whole model."""
    if recipe.fp8.recipe == "none" or recipe.train is None:
        return range(0)
    return range(recipe.fp8.bf16_layers_at_start, arch.num_layers - recipe.fp8.bf16_layers_at_end)


def is_cast(parameter: Parameter, in_fp8: range) -> bool:
    """Whether it is the weight of a linear layer that multiplies in FP8."""
    part = parameter.name.split(".")
    return part[-1] == "weight" and part[-2].startswith("linear_") and int(part[2]) in in_fp8


def has_no_other(recipe: Recipe, parameter: Parameter, in_fp8: range) -> bool:
    """Whether the FP8 copy is in the place of the weight."""
    return recipe.fp8.frozen_weights == "fp8" and not parameter.learns and is_cast(parameter, in_fp8)


def cast_bytes(recipe: Recipe, chunks: Sequence[Sequence[Parameter]], layers: Layers, arch: Architecture) -> int:
    """What a rank keeps of all its weights, scales included."""
    in_fp8 = layers_in_fp8(recipe, arch)
    return sum(
        _kept(
            recipe,
            parameter,
            layers,
            alone=has_no_other(recipe, parameter, in_fp8),
            has_norm=not arch.norm_after and _may_have_norm(parameter),
        )
        for chunk in chunks
        for parameter in chunk
        if is_cast(parameter, in_fp8)
    )


def _kept(recipe: Recipe, parameter: Parameter, layers: Layers, *, alone: bool, has_norm: bool) -> int:
    """alone: the copy is in the place of the weight. has_norm: its linear layer is one with the norm before it."""
    if is_spread(parameter, layers.place):
        return held_elements(parameter, layers.place) + _SCALE if alone else 0
    transposed = _has_input_gradient(parameter, layers) or (has_norm and not alone)
    return of_weight(recipe.fp8.recipe, parameter, transposed=transposed)


def _has_input_gradient(parameter: Parameter, layers: Layers) -> bool:
    # the router's weights, which learn, come before the second layer of a new expert
    above_router = ".mlp.experts." in parameter.name and ".linear_fc2." in parameter.name
    return above_router or layers.below_learns[int(parameter.name.split(".")[2])]


def _may_have_norm(parameter: Parameter) -> bool:
    return ".linear_qkv." in parameter.name or parameter.name.endswith(".mlp.linear_fc1.weight")


def of_weight(recipe: str, parameter: Parameter, *, transposed: bool) -> int:
    """Of one weight as Transformer Engine lays it out on an H100: newer GPUs need no transposed copy (`tensorwise`)."""
    values = parameter.elements * (1 + transposed)
    if recipe == "tensorwise":
        return values + _SCALE
    if recipe == "mxfp8":  # a byte for 32 numbers
        return values + values // 32
    rows, columns = -(-parameter.rows // _BLOCK), -(-parameter.columns // _BLOCK)
    scales = rows * _to_4(columns) + transposed * columns * _to_4(rows)
    return values + 4 * scales


def _to_4(number: int) -> int:
    return -(-number // 4) * 4
