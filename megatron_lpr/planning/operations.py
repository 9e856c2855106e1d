"""Floating-point operations of a pipeline stage in one step: what the model needs, and what recomputation adds."""

import dataclasses
from dataclasses import dataclass

from megatron_lpr.families import Architecture
from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.model.rank.casts import layers_in_fp8
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.place import Place
from megatron_lpr.recipe.settings import ParallelConfig, Recipe, Recompute
from megatron_lpr.training.cost import StepFlops, logits_in_chunks, step_flops


@dataclass(frozen=True)
class Operations:
    """Of the whole batch, on all ranks of a stage together.

    products: of weights' matrices. scores: of attention, causal. again: what recomputation adds.
    in_fp8: how many of all of them multiply numbers of 8 bits.
    """

    products: int = 0
    scores: int = 0
    again: int = 0
    in_fp8: int = 0

    @property
    def total(self) -> int:
        return self.products + self.scores + self.again


def operations(recipe: Recipe, arch: Architecture, layers: Layers, recompute: Recompute) -> Operations:
    """Of the chunks of a stage."""
    assert recipe.train is not None and recipe.data is not None
    tokens = recipe.train.global_batch_size * recipe.data.seq_length
    products = scores = again = 0
    for number, chunk in enumerate(layers.chunks):
        predicts = layers.place.is_last and number == len(layers.chunks) - 1
        up_to = _first_layers(recipe, arch, chunk.stop, recompute, predicts=predicts)
        before = _first_layers(recipe, arch, chunk.start, recompute, predicts=False)
        products += up_to.total - before.total
        again += up_to.again - before.again
    length = recipe.data.seq_length
    reach = min(length, arch.sliding_window or length)
    in_sight = reach * (2 * length - reach) / (2 * length)  # positions, in the mean: half of all without a window
    of_scores = round(4 * tokens * in_sight * arch.num_attention_heads * arch.head_dim)  # q k^T, the product with v
    for kind, number in layers.kinds.items():
        scores += number * of_scores * (3 if kind.below_learns else 1)
        if recompute == "full":
            again += number * of_scores
    in_fp8 = sum(
        _in_fp8(recipe, arch, layers, layer, recompute)
        for chunk in layers.chunks
        for layer in chunk
        if layer in layers_in_fp8(recipe, arch)
    )
    return Operations(products=products, scores=scores, again=again, in_fp8=in_fp8)


def _in_fp8(recipe: Recipe, arch: Architecture, layers: Layers, layer: int, recompute: Recompute) -> int:
    """All products of a layer's weights but the router's."""
    assert recipe.train is not None and recipe.data is not None
    up_to, before = (_first_layers(recipe, arch, number, recompute, predicts=False) for number in (layer + 1, layer))
    executed = up_to.executed - before.executed
    if not layers.has_experts[layer]:
        return executed
    tokens = recipe.train.global_batch_size * recipe.data.seq_length
    recomputes = recompute != "none"
    below = recomputes or recipe.train.trainable == "all" or any(layer > moe for moe in arch.moe_layers())
    # forward, where it is computed again once more, and the gradients of the weight and of what it is given
    return executed - 2 * tokens * recipe.model.num_experts * arch.hidden_size * (2 + recomputes + below)


def model_operations(recipe: Recipe, arch: Architecture) -> Operations:
    """Of all layers, nothing computed twice; the vocabulary is padded as for one rank."""
    assert recipe.train is not None
    alone, train = ParallelConfig(), dataclasses.replace(recipe.train, recompute="none")
    recipe = dataclasses.replace(recipe, parallel=alone, train=train)
    all_of_it = operations(recipe, arch, Layers(recipe, arch, Place(alone, 1, 0), train), "none")
    return dataclasses.replace(all_of_it, again=0)  # of logits in chunks


def _first_layers(
    recipe: Recipe, arch: Architecture, number: int, recompute: Recompute, *, predicts: bool
) -> StepFlops:
    """Of the model's first layers alone, whose routing slots go evenly to all experts."""
    assert recipe.train is not None and recipe.data is not None
    model, tokens = recipe.model, recipe.train.global_batch_size * recipe.data.seq_length
    frozen = tokens * model.topk * model.num_frozen_experts // model.num_experts if model.num_experts else 0
    dense = tuple(layer for layer in arch.mlp_only_layers if layer < number)
    return step_flops(
        dataclasses.replace(arch, num_layers=number, mlp_only_layers=dense),
        model,
        recipe.train.trainable,
        tokens=tokens,
        frozen_slots=[frozen] * number,
        vocab_size=padded_vocab_size(arch.vocab_size, recipe.parallel.tensor) if predicts else 0,
        recompute=recompute,
        logits_in_chunks=logits_in_chunks(recipe, arch),
    )
