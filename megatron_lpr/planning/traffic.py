"""What the collectives of a rank carry of the batch in one optimizer step, in closed form.

Scalars (the gradient's norm, the metrics of a step) are left out.

Shapes: T tokens of this rank, W of its tensor-parallel group, of one micro-batch; H hidden.
"""

from collections.abc import Iterator

from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.place import Group, Place
from megatron_lpr.planning.activations import Activations
from megatron_lpr.planning.head import Head
from megatron_lpr.planning.moves import Move, in_groups, repeated
from megatron_lpr.planning.schedule import micro_batches

_FP32, _INT64 = 4, 8


def of_batch(layers: Layers, activations: Activations) -> list[Move]:
    """What is sent of tokens, their states and gradients."""
    count = micro_batches(activations.train, layers.place)
    each = [*_of_layers(layers, activations), *_of_ends(layers.place, activations)]
    return in_groups([*_of_pipeline(layers, activations, count), *repeated(each, count)], layers.place)


def _of_layers(layers: Layers, activations: Activations) -> Iterator[Move]:
    for kind, number in layers.kinds.items():
        again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[activations.train.recompute]
        found = list(_of_attention(activations, kind.below_learns, 1 + again[0]))
        if kind.has_experts:
            found += _of_experts(activations, kind.below_learns, 1 + again[1])
        else:
            dense_again = again[0] if activations.recipe.model.num_experts else again[1]
            found += _of_region(activations, kind.below_learns, 1 + dense_again, learns="mlp.linear")
        yield from repeated(found, number)


def _of_region(activations: Activations, below_learns: bool, forwards: int, learns: str) -> Iterator[Move]:
    """Into a tensor-parallel region, whose ranks share every token, and out of it (arXiv 2205.05198)."""
    weight = activations.learns(learns)
    backward = int(below_learns or weight)
    # a linear layer that learns gathers its input a second time, for the weight's gradient
    yield Move("all_gather", "tensor", activations.hidden, forwards + backward + weight)
    yield Move("reduce_scatter", "tensor", activations.wide_hidden, forwards + backward)


def _of_attention(activations: Activations, below_learns: bool, forwards: int) -> Iterator[Move]:
    yield from _of_region(activations, below_learns, forwards, learns="self_attention.")
    arch, sizes = activations.arch, activations.recipe.parallel
    both = activations.wide_tokens * 2 * arch.num_query_groups * arch.head_dim // sizes.tensor * activations.itemsize
    backward = int(below_learns or activations.learns("self_attention."))
    if arch.qk_norm_across_heads:
        yield Move("all_reduce", "tensor", 2 * activations.wide_tokens * _FP32, forwards + backward)
    yield Move("all_gather", "context", both, forwards)
    yield Move("reduce_scatter", "context", both * sizes.context, backward)


def _of_experts(activations: Activations, below_learns: bool, forwards: int) -> Iterator[Move]:
    recipe, arch = activations.recipe, activations.arch
    sizes, model = recipe.parallel, recipe.model
    new, backward = model.num_experts - model.num_frozen_experts, int(below_learns)
    if recipe.balance.coeff:
        sequences = activations.train.micro_batch_size if recipe.balance.group == "sequence" else 1
        of: Group = "tensor" if sizes.tensor > 1 else "context"
        yield Move("all_reduce", of, sequences * (model.num_experts + 1) * _FP32)
    if sizes.dispatcher == "allgather":
        yield from _gathered_tokens(activations, new, backward, forwards)
        return
    sent = activations.slots(frozen=False)
    rows = sent * arch.hidden_size
    yield Move("all_gather", "expert" if sizes.expert > 1 else "expert_tensor", new * _INT64, forwards)
    yield Move("all_to_all", "expert", rows * activations.itemsize, forwards + backward)  # tokens
    yield Move("all_to_all", "expert", sent * _FP32, forwards + 1)  # probabilities
    yield Move("all_to_all", "expert", rows * activations.itemsize, forwards + 1)  # outputs
    tensor = sizes.expert_tensor
    yield Move("all_gather", "expert_tensor", rows * activations.itemsize, forwards)
    yield Move("all_gather", "expert_tensor", sent * _FP32, forwards)
    yield Move("reduce_scatter", "expert_tensor", tensor * rows * activations.itemsize, backward)
    yield Move("reduce_scatter", "expert_tensor", tensor * sent * _FP32)
    yield Move("reduce_scatter", "expert_tensor", tensor * rows * _FP32, forwards)  # outputs, in the router's dtype
    yield Move("all_gather", "expert_tensor", rows * _FP32)


def _gathered_tokens(activations: Activations, new: int, backward: int, forwards: int) -> Iterator[Move]:
    """Every rank gets the tokens of all; the group holds tensor- and expert-parallel ranks of the experts."""
    sizes = activations.recipe.parallel
    of: Group = "expert" if sizes.expert > 1 else "expert_tensor"
    ranks, tokens = sizes.expert * sizes.expert_tensor, activations.tokens
    hidden = tokens * activations.arch.hidden_size
    yield Move("all_gather", of, tokens * new, forwards)  # who goes where
    yield Move("all_gather", of, tokens * new * _FP32, forwards)
    yield Move("all_gather", of, hidden * activations.itemsize, forwards)
    yield Move("reduce_scatter", of, ranks * hidden * _FP32, forwards)
    yield Move("all_gather", of, hidden * _FP32)
    yield Move("reduce_scatter", of, ranks * hidden * activations.itemsize, backward)
    yield Move("reduce_scatter", of, ranks * tokens * new * _FP32)


def _of_ends(place: Place, activations: Activations) -> Iterator[Move]:
    """Embedding, output layer and loss."""
    if place.is_first:
        yield Move("reduce_scatter", "tensor", activations.wide_hidden)
        yield Move("all_gather", "tensor", activations.hidden, int(activations.learns("embedding.")))
    if place.is_last:
        yield from Head(activations).moves()


def _of_pipeline(layers: Layers, activations: Activations, count: int) -> Iterator[Move]:
    place = layers.place
    chunks = place.sizes.virtual_pipeline
    yield Move("send", "pipeline", activations.hidden, count * (chunks - place.is_last))
    yield Move("send", "pipeline", activations.hidden, count * (chunks - place.is_first))
