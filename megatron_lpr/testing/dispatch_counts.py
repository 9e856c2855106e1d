"""What each expert-parallel rank sends and computes in one MoE layer, ours and Megatron-Core's, under one routing.

Counted while the layers run: rows that enter an all-to-all, and rows that experts compute.
Shapes: T tokens of a rank, N new experts, H hidden.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.settings import ModelConfig, ParallelConfig, Recipe

TOPK = 2


@dataclass(kw_only=True)
class LayerCounts:
    """Of one rank, in one forward pass."""

    sent_rows: int = 0  # hidden vectors handed to all-to-all, there and back, those for the rank itself included
    computed_rows: int = 0  # tokens that experts of this rank compute


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """Of one rank: its slots, and what both layers did with them."""

    frozen_slots: int
    new_slots: int
    ours: LayerCounts
    megatron: LayerCounts


def review_routing(tokens: int, original: float, num_new: int, *, seed: int) -> Tensor:
    """Choices [T, 1 + N] of a reviewed router, bool: original tokens take the frozen expert (column 0) and one new
    expert, the others two new ones; all new experts are as likely. `original` is the share of original tokens."""
    generator = torch.Generator().manual_seed(seed)
    order_TN = torch.rand(tokens, num_new, generator=generator).argsort(1)
    chosen_TE = torch.zeros(tokens, 1 + num_new, dtype=torch.bool)
    chosen_TE.scatter_(1, 1 + order_TN[:, :TOPK], True)
    is_original_T = torch.arange(tokens) < round(original * tokens)
    chosen_TE[is_original_T, 1 + order_TN[is_original_T, TOPK - 1]] = False
    chosen_TE[is_original_T, 0] = True
    return chosen_TE


def count_dispatch(base: Path, num_new: int, tokens: int, batches: list[list[float]]) -> list[RankCounts]:
    """Run both layers on this rank, all ranks expert-parallel, over batches given as shares of original tokens by rank.

    Megatron-Core wants the number of experts divisible by the ranks: the frozen expert gets rank 0 for itself, padded
    with experts that nobody chooses, and the new experts the other ranks. `num_new` must be divisible by the number of
    ranks, for our layer, and by one less, for this one.
    """
    from megatron_lpr.platform import device, megatron

    with megatron() as ranks:
        from megatron_lpr.model.builder import init_model_parallel

        recipe = Recipe(
            name="dispatch",
            output="none",
            model=ModelConfig(base=str(base), num_experts=1 + num_new, spec="local"),
            parallel=ParallelConfig(expert=ranks.world_size),
        )
        init_model_parallel(recipe.parallel)
        num_padding = num_new // (ranks.world_size - 1) - 1
        ours, theirs = _our_layer(recipe), _megatron_layer(recipe, 1 + num_padding + num_new)
        results = []
        for original in batches:
            chosen_TE = review_routing(tokens, original[ranks.rank], num_new, seed=ranks.rank).to(device())
            padding = torch.zeros(tokens, num_padding, dtype=torch.bool, device=device())
            results.append(
                RankCounts(
                    frozen_slots=int(chosen_TE[:, 0].sum()),
                    new_slots=int(chosen_TE[:, 1:].sum()),
                    ours=_count(ours, chosen_TE),
                    megatron=_count(theirs, torch.cat([chosen_TE[:, :1], padding, chosen_TE[:, 1:]], dim=1)),
                )
            )
        return results


def _our_layer(recipe: Recipe) -> Any:
    from megatron_lpr.model.builder import build_model

    model: Any = build_model(recipe, read_architecture(recipe.model.base))[0]
    return model.decoder.layers[0].mlp


def _megatron_layer(recipe: Recipe, num_experts: int) -> Any:
    """Megatron-Core's own MoELayer of the same sizes, every expert dispatched."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_lpr.model.layer_specs import submodules_of
    from megatron_lpr.model.transformer_config import transformer_config

    config = dataclasses.replace(
        transformer_config(recipe, read_architecture(recipe.model.base), te=False), num_moe_experts=num_experts
    )
    submodules = submodules_of(get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False))
    return MoELayer(config, submodules, layer_number=1, pg_collection=get_default_pg_collection())


@torch.no_grad()
def _count(layer: Any, chosen_TE: Tensor) -> LayerCounts:
    """One forward pass with the routing given instead of the router's."""
    counts, hidden = LayerCounts(), layer.config.hidden_size

    def computes(module, inputs) -> None:
        counts.computed_rows += len(inputs[0])

    layer.eval()
    layer.route = lambda hidden_states, tags_SB=None: (chosen_TE / TOPK, chosen_TE)
    experts = (layer.experts, *getattr(layer, "frozen_experts", ()))
    hooks = [module.register_forward_pre_hook(computes) for module in experts]
    with _all_to_all_counted(counts, hidden):
        layer(torch.zeros(len(chosen_TE), 1, hidden, device=chosen_TE.device))
    for hook in hooks:
        hook.remove()
    return counts


@contextlib.contextmanager
def _all_to_all_counted(counts: LayerCounts, hidden: int) -> Iterator[None]:
    plain = dist.all_to_all_single

    def all_to_all_single(output, input, *args, **kwargs):
        if input.shape[-1] == hidden:
            counts.sent_rows += len(input)
        return plain(output, input, *args, **kwargs)

    dist.all_to_all_single = all_to_all_single
    try:
        yield
    finally:
        dist.all_to_all_single = plain
