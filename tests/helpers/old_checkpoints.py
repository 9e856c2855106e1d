"""Checkpoints as older versions wrote them: Megatron's own form of the optimizer's state, routers of bfloat16."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch

from megatron_lpr.checkpoint import content, save
from megatron_lpr.platform.shims import cuda_type_names


@contextlib.contextmanager
def written_as_before(optimizer) -> Iterator[None]:
    """Inside it a save of this optimizer is that of version 3 of run.json."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}

    def with_optimizer(chunks, held):
        state = content.model_state(chunks, held)
        model = state["model0"] if "model1" not in state else dict(state)
        with cuda_type_names():
            state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
        return state

    with patch.object(save, "model_state", with_optimizer), patch.object(save, "written_state", lambda *_: ([], [])):
        yield


@contextlib.contextmanager
def routers_as_before() -> Iterator[None]:
    """Inside it a model in bfloat16 is built with routers in bfloat16, and has their fp32 values in the optimizer."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_lpr.model.lpr_router import LPRRouter

    with (
        patch.object(LPRRouter, "_apply", torch.nn.Module._apply),
        patch.object(LPRRouter, "gating", TopKRouter.gating),
    ):
        yield
