"""Norms that Megatron-Core has no place for: of all heads together, and of what leaves attention or FFN.

Shapes: S positions, B sequences, N heads of this tensor-parallel rank, D head size, H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; Megatron's WrappedTorchNorm refuses sequence parallelism, this one marks its weight for it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        weight: Any = self.weight  # Megatron looks for the mark
        weight.sequence_parallel = config.sequence_parallel


class AcrossHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over the channels of all heads at once, of which a tensor-parallel rank has those of its own."""

    def __init__(self, config: TransformerConfig, num_heads: int) -> None:
        """num_heads: of all ranks together."""
        super().__init__()
        assert config.kv_channels is not None
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._channels, self._eps = num_heads * config.kv_channels, config.layernorm_epsilon
        self.weight = torch.nn.Parameter(
            torch.empty(
                self._channels // self._group.size(), dtype=config.params_dtype, device=torch.cuda.current_device()
            )
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x_SBND: Tensor) -> Tensor:
        """Of the same shape and dtype; sums are in fp32."""
        x = x_SBND.flatten(-2)
        if self._group.size() == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self._eps).view_as(x_SBND)
        wide = x.float()
        squares = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), self._group)
        normed = wide * torch.rsqrt(squares / self._channels + self._eps) * self.weight
        return normed.to(x.dtype).view_as(x_SBND)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class AcrossHeadsAttention(SelfAttention):
    """Megatron's, with such norms of q and k.

    It is not told of them (`qk_layernorm`), for their weights would have gradients that are sums over tensor-parallel
    ranks: those of one head are the same on each.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        assert not config.qk_layernorm and config.num_query_groups is not None
        self.q_layernorm = AcrossHeadsRMSNorm(config, config.num_attention_heads)
        self.k_layernorm = AcrossHeadsRMSNorm(config, config.num_query_groups)


class _SumOverRanks(torch.autograd.Function):
    """Each rank's outputs depend on the sum, so that its gradient is a sum over the ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class NormThenAdd(torch.nn.Module):
    """In the place of Megatron's bias_dropout_add: residual + norm(x), of the output x of attention or FFN."""

    def __init__(self, config: TransformerConfig, norm: Callable[..., torch.nn.Module]) -> None:
        super().__init__()
        self.layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """What Megatron calls with (x [S, B, H] and its bias, residual [S, B, H], dropout)."""
        return self._add

    def _add(self, x_with_bias: tuple[Tensor, Tensor | None], residual_SBH: Tensor, dropout: float) -> Tensor:
        x_SBH, bias = x_with_bias
        assert bias is None and not dropout
        return residual_SBH + self.layernorm(x_SBH)
