"""Floating-point operations of a pipeline stage in one step: what the model needs, and what recomputation adds."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_lpr.families import Architecture
from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.model.rank.casts import layers_in_fp8
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.place import Place
from megatron_lpr.recipe.settings import ParallelConfig, Recipe
from megatron_lpr.training.cost import StepFlops, step_flops


@dataclass(frozen=True)
class Operations:
    """Of the whole batch, on all ranks of a stage together.

    products: of weights' matrices. scores: of attention, causal. again: what is computed a second time.
    in_fp8: how many of all of them multiply numbers of 8 bits.
    """

    products: int = 0
    scores: int = 0
    again: int = 0
    in_fp8: int = 0

    @property
    def total(self) -> int:
        return self.products + self.scores + self.again


def operations(
    recipe: Recipe, arch: Architecture, layers: Layers, recompute: Literal["none", "selective", "full"]
) -> Operations:
    """Of the chunks of a stage."""
    assert recipe.train is not None and recipe.data is not None
    tokens = recipe.train.global_batch_size * recipe.data.seq_length
    products = forward = scores = again = 0
    for number, chunk in enumerate(layers.chunks):
        predicts = layers.place.is_last and number == len(layers.chunks) - 1
        up_to = _first_layers(recipe, arch, chunk.stop, predicts=predicts)
        before = _first_layers(recipe, arch, chunk.start, predicts=False)
        products += up_to.total - before.total
        forward += _first_layers(recipe, arch, chunk.stop, predicts=False).forward - before.forward
    width = arch.num_attention_heads * arch.head_dim
    reach = min(recipe.data.seq_length, arch.sliding_window or recipe.data.seq_length)
    of_scores = 2 * tokens * reach * width  # q k^T and the product with v, each over half of the positions
    for kind, number in layers.kinds.items():
        scores += number * of_scores * (3 if kind.below_learns else 1)
        if recompute == "selective" and kind.has_experts:
            again += number * 2 * tokens * (recipe.model.topk * 3 * arch.ffn_hidden_size * arch.hidden_size)
        if recompute == "full":
            again += number * of_scores
    if recompute == "full":
        again += forward
    in_fp8 = sum(
        _in_fp8(recipe, arch, layers, layer, recompute)
        for chunk in layers.chunks
        for layer in chunk
        if layer in layers_in_fp8(recipe, arch)
    )
    return Operations(products=products, scores=scores, again=again, in_fp8=in_fp8)


def _in_fp8(recipe: Recipe, arch: Architecture, layers: Layers, layer: int, recompute: str) -> int:
    """All products of a layer's weights but the router's."""
    assert recipe.train is not None and recipe.data is not None
    up_to, before = (_first_layers(recipe, arch, number, predicts=False) for number in (layer + 1, layer))
    total, forward = up_to.total - before.total, up_to.forward - before.forward
    if not layers.has_experts[layer]:
        return total + forward * (recompute == "full")
    tokens = recipe.train.global_batch_size * recipe.data.seq_length
    of_router = 2 * tokens * recipe.model.num_experts * arch.hidden_size
    everything = recipe.train.trainable == "all"
    backward = 1 + (everything or any(layer > moe for moe in arch.moe_layers()))
    total -= of_router * (1 + backward)
    if recompute == "selective":
        total += 2 * tokens * recipe.model.topk * 3 * arch.ffn_hidden_size * arch.hidden_size
    return total + (forward - of_router) * (recompute == "full")


def model_operations(recipe: Recipe, arch: Architecture) -> Operations:
    """Of all layers, nothing computed twice; the vocabulary is padded as for one rank."""
    assert recipe.train is not None
    alone, train = ParallelConfig(), dataclasses.replace(recipe.train, recompute="none")
    recipe = dataclasses.replace(recipe, parallel=alone, train=train)
    return operations(recipe, arch, Layers(recipe, arch, Place(alone, 1, 0), train), "none")


def _first_layers(recipe: Recipe, arch: Architecture, number: int, *, predicts: bool) -> StepFlops:
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
    )
