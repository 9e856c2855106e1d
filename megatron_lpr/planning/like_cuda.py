"""Modules that save on this CPU what they save on CUDA, where they run as fused kernels."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_lpr.model import builder
from megatron_lpr.model.transformer_config import transformer_config


@contextlib.contextmanager
def like_cuda() -> Iterator[None]:
    """Inside it models are built, and compute, with stand-ins for two fused kernels: shapes alone are right."""
    with (
        mock.patch.object(builder, "transformer_config", _with_fused_swiglu),
        mock.patch.object(torch.nn.functional, "rms_norm", _fused_norm),
    ):
        yield


def _with_fused_swiglu(*args: Any) -> Any:
    """Megatron's fused SwiGLU keeps its input only; it is for CUDA, and runs as plain operations here."""
    config = transformer_config(*args)
    config.bias_activation_fusion = True
    return config


def _fused_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)


class _FusedRMSNorm(torch.autograd.Function):
    """torch's aten::_fused_rms_norm (2.13), which has no CPU kernel, keeps its input, its weight and 1/rms in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return torch.empty_like(x) if needs_x else None, torch.empty_like(weight) if needs_weight else None
