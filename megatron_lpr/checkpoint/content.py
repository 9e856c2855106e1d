"""What a checkpoint holds, as Megatron's sharded state: weights, and what the optimizer has learnt of them."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_lpr.checkpoint.holding import Content, holds
from megatron_lpr.checkpoint.row_shards import sharded_state
from megatron_lpr.platform.shims import cuda_type_names

Chunks = Sequence[torch.nn.Module]


def model_state(chunks: Chunks, content: Content = "whole") -> dict[str, Any]:
    """The parameters of this rank that a checkpoint of this content holds, each with its place in the whole tensor."""
    return {
        f"model{index}": {
            name: entry for name, entry in sharded_state(unwrap_model(chunk)).items() if holds(content, name)
        }
        for index, chunk in enumerate(chunks)
    }


def optimizer_state(optimizer, content: dict[str, Any], is_loading: bool) -> Any:
    """Moments, masters and steps of `content`'s parameters, which load at any layout."""
    model = content["model0"] if "model1" not in content else {k: v for k, v in content.items()}
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}  # loads at any layout
    if is_loading:
        _allocate_state(optimizer)
    with cuda_type_names():
        return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)


def _allocate_state(optimizer) -> None:
    """Give torch's AdamW the state of step 0: Megatron cannot load into one that has never made a step.

    Of Transformer Engine's and Apex's FusedAdam, which Megatron prefers, it allocates the state by itself.
    """
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if isinstance(adam, torch.optim.AdamW):
            for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.zeros(())} | moments
