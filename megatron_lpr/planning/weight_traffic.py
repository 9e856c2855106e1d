"""What the collectives of a rank carry of weights and their gradients in one optimizer step."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from megatron_lpr.families.table import EMBEDDING, OUTPUT_LAYER
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.parameters import Parameter
from megatron_lpr.model.rank.place import Group, Place
from megatron_lpr.model.rank.shards import held_elements, is_spread, unit_name
from megatron_lpr.planning.buffers import Bucket
from megatron_lpr.planning.moves import Move, in_groups

_FP32 = 4
Chunks = Sequence[Sequence[Parameter]]
Itemsize = Callable[[Parameter], int]


def of_frozen_weights(layers: Layers, chunks: Chunks, itemsize: Itemsize) -> list[Move]:
    """Gathered for the forward pass of a micro-batch, and again for its backward pass.

    itemsize: bytes of a number of a parameter.
    """
    place = layers.place
    tied = place.is_last and all(parameter.name != OUTPUT_LAYER for chunk in chunks for parameter in chunk)
    units: Counter[tuple[str, Group, int]] = Counter()
    for parameter in (p for chunk in chunks for p in chunk if is_spread(p, place)):
        key = unit_name(parameter), parameter.copies, _passes(parameter, layers, tied)
        units[key] += held_elements(parameter, place) * itemsize(parameter)
    alike = Counter((ranks, passes, size) for (_, ranks, passes), size in units.items())
    return [
        Move("all_gather", ranks, size, number * passes, purpose="frozen")
        for (ranks, passes, size), number in alike.items()
    ]


def _passes(parameter: Parameter, layers: Layers, tied: bool) -> int:
    """How often it is gathered for each micro-batch.

    tied: the output layer computes with the embedding's weight.
    """
    if parameter.name == EMBEDDING:
        return 1 + tied
    if not parameter.name.startswith("decoder.layers."):
        return 2
    if ".mlp.experts." in parameter.name:  # what they compute is weighed by a router, which learns
        return 2
    return 1 + layers.below_learns[int(parameter.name.split(".")[2])]


def of_gradients(chunks: Chunks, laid_out: Sequence[Bucket], place: Place) -> list[Move]:
    """Summed once a step; with the distributed optimizer each rank updates its part, and all get the new weights."""
    return in_groups(_of_gradients(chunks, laid_out, place), place)


def _of_gradients(chunks: Chunks, laid_out: Sequence[Bucket], place: Place) -> Iterator[Move]:
    # each of Megatron's optimizers, of experts and of the others, gathers all parameters of its model chunks
    times = 1 if place.sizes.overlap_param_gather else len({bucket.group for bucket in laid_out})
    for bucket in laid_out:
        ranks = place.size(bucket.group)
        if place.sizes.distributed_optimizer:
            yield Move("reduce_scatter", bucket.group, bucket.elements * _FP32)
            yield Move("all_gather", bucket.group, bucket.elements // ranks * bucket.itemsize, times)
        else:
            yield Move("all_reduce", bucket.group, bucket.elements * _FP32)
    learning = [parameter for chunk in chunks for parameter in chunk if parameter.learns]
    # of weights that each tensor-parallel rank has whole: it has seen its own tokens only
    whole = sum(p.elements for p in learning if p.whole)
    yield Move("all_reduce", "tensor", whole * _FP32)
    yield Move("all_reduce", "pipeline", sum(p.elements for p in learning if p.twin) * _FP32)
