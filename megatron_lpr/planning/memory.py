"""Bytes of a rank by kind, in closed form."""

from collections.abc import Sequence

from megatron_lpr.families import Architecture
from megatron_lpr.model.parameters import itemsize
from megatron_lpr.model.rank.frozen import uncast_bytes
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.parameters import Parameter
from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning.activations import Activations
from megatron_lpr.planning.amounts import RankMemory
from megatron_lpr.planning.buffers import Bucket
from megatron_lpr.planning.head import Head
from megatron_lpr.planning.schedule import micro_batches, on_their_way
from megatron_lpr.recipe.settings import Recipe

_FP32 = 4


def states(
    recipe: Recipe,
    arch: Architecture,
    chunks: Sequence[Sequence[Parameter]],
    laid_out: Sequence[Bucket],
    place: Place,
) -> RankMemory:
    """What does not depend on the batch: weights, gradients, state of the optimizer."""
    dtype = recipe.model.dtype
    everything = [parameter for chunk in chunks for parameter in chunk]
    learning = [parameter for parameter in everything if parameter.learns]
    return RankMemory(
        frozen=uncast_bytes(recipe, arch, everything, place),
        trained=sum(p.elements * itemsize(p.name, dtype) for p in learning),
        gradients=sum(bucket.elements for bucket in laid_out) * _FP32,
        optimizer=sum(_of_optimizer(bucket, place) for bucket in laid_out),
    )


def _of_optimizer(bucket: Bucket, place: Place) -> int:
    """Two moments of Adam, and the weight where the model's is not fp32 itself."""
    ranks = place.size(bucket.group) if place.sizes.distributed_optimizer else 1
    updated = bucket.shard(place.index(bucket.group) if ranks > 1 else 0, ranks)
    return updated * _FP32 * (2 if bucket.itemsize == _FP32 else 3)


def of_batch(layers: Layers, activations: Activations) -> RankMemory:
    """What the micro-batches on their way need."""
    train, place = activations.train, layers.place
    held = on_their_way(place, micro_batches(train, place))
    saved = sum(
        count * number * activations.saved(has_experts=kind.has_experts, below_learns=kind.below_learns)
        for chunk, count in enumerate(held)
        for kind, number in layers.kinds_of(chunk).items()
    )
    saved += sum(held) * activations.handed_over() + len(held) * activations.angles()
    working = 0
    if train.recompute != "none":
        working = max(activations.computed_again(has_experts=kind.has_experts) for kind in layers.kinds)
    logits = 0
    if place.is_last:
        head = Head(activations)
        saved += held[-1] * head.saved()
        logits = head.logits()
        working = max(working, head.working())
    return RankMemory(activations=saved, logits=logits, working=working)
