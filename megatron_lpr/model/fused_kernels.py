"""Which of Transformer Engine's fused kernels compute a model.

They are found by what is installed, never by versions. Each was looked at for frozen weights and frozen experts, which
Megatron-Core does not know: docs/performance.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_lpr.families import Architecture
from megatron_lpr.recipe.settings import Recipe

_PERMUTATION = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)


@dataclass(frozen=True, kw_only=True)
class FusedKernels:
    """Parts of a layer that one kernel computes."""

    router: bool = False
    permutation: bool = False
    rope: bool = False


def fused_kernels(recipe: Recipe, arch: Architecture, te: bool) -> FusedKernels:
    """Those that a recipe's model has here; all are Transformer Engine's."""
    if recipe.model.fused_kernels == "off" or not te or not torch.cuda.is_available():
        return FusedKernels()
    return FusedKernels(
        router=_installed("fused_topk_with_score_function"),
        permutation=_installed(*_PERMUTATION) and _never_permutes_nothing(recipe),
        # Megatron 0.16 tells the kernel that keeps documents apart nothing of interleaved channels
        rope=_installed("fused_apply_rotary_pos_emb") and not arch.rope_interleaved,
    )


def _installed(*names: str) -> bool:
    from megatron.core.extensions import transformer_engine

    return all(getattr(transformer_engine, name, None) is not None for name in names)


def _never_permutes_nothing(recipe: Recipe) -> bool:
    """Transformer Engine's kernel returns no rows where a rank's tokens have no slot at all, in place of rows of zeros.

    That happens where all slots of a token may be frozen experts', and where ranks gather all tokens and then have
    none for their own experts. DeepEP hands over tokens with a slot only.
    """
    dispatcher, model = recipe.parallel.dispatcher, recipe.model
    return dispatcher == "flex" or (dispatcher == "alltoall" and model.topk > model.num_frozen_experts)


def description(chunks: Iterable[torch.nn.Module]) -> str:
    """What computes these chunks and their update, for the log."""
    from megatron.core.optimizer import Adam

    found = set()
    for chunk in chunks:
        for module in chunk.modules():
            if any(
                getattr(module, name, False) for name in ("fuse_wgrad_accumulation", "gradient_accumulation_fusion")
            ):
                found.add("gradient accumulation")
            config = getattr(module, "config", None)
            for name, field in (
                ("router", "moe_router_fusion"),
                ("permutation", "moe_permute_fusion"),
                ("rotary embedding", "apply_rope_fusion"),
            ):
                if getattr(config, field, False):
                    found.add(name)
    names = {"torch": "PyTorch", "apex": "Apex", "transformer_engine": "Transformer Engine"}
    package = Adam.__module__.split(".")[0]
    return f"fused kernels: {', '.join(sorted(found)) or 'none'}; Adam of {names.get(package, package)}"
