"""Kernels that add a weight's gradient where it is kept: Transformer Engine's and Apex's."""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_lpr.model.grouped_experts import GroupedExperts


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
