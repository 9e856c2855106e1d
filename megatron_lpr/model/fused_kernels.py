"""Which fused kernels compute a model: Transformer Engine's, and those that add a weight's gradient where it is kept.

They are found by what is installed, never by versions. Each was looked at for frozen weights and frozen experts, which
Megatron-Core does not know: docs/performance.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_lpr.model.grouped_experts import GroupedExperts
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


def fused_kernels(recipe: Recipe, te: bool) -> FusedKernels:
    """Those that a recipe's model has here; all are Transformer Engine's."""
    if recipe.model.fused_kernels == "off" or not te or not torch.cuda.is_available():
        return FusedKernels()
    return FusedKernels(
        router=_installed("fused_topk_with_score_function"),
        permutation=_installed(*_PERMUTATION) and _never_permutes_nothing(recipe),
        rope=_installed("fused_apply_rotary_pos_emb"),
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


def fuse_gradient_accumulation(chunks: Iterable[torch.nn.Module]) -> None:
    """Have products for weight gradients add to Megatron's gradient buffer in fp32, where there is a kernel for it.

    It replaces a gradient in bfloat16 and its addition. Only for modules whose weights are trained: Megatron's switch
    is for all of a model, and Transformer Engine marks frozen weights with a buffer that is None.
    """
    modules: list[Any] = [module for chunk in chunks for module in chunk.modules()]
    # Their weights' gradients come from torch's grouped product. Where a rank has no token Megatron's loop runs, and
    # would mark the gradients of the whole step as added.
    in_grouped_products = {
        id(module)
        for experts in modules
        if isinstance(experts, GroupedExperts) and experts.is_grouped
        for module in experts.modules()
    }
    for module in modules:
        weights = _own_weights(module)
        if id(module) in in_grouped_products or not weights or not all(weight.requires_grad for weight in weights):
            continue
        if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's
            module.fuse_wgrad_accumulation = True
        elif hasattr(module, "gradient_accumulation_fusion") and layers._grad_accum_fusion_available:  # with Apex
            module.gradient_accumulation_fusion = True


def _own_weights(module: torch.nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in module.named_parameters(recurse=False) if name.startswith("weight")]


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
