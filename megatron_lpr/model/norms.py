"""Norms that Megatron-Core has no place for: of all heads together, and of what leaves attention or FFN.

Shapes: S positions, B sequences, N heads of this tensor-parallel rank, D head size, H hidden.
"""

from collections.abc import Callable, Sequence
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
    """The weight of an RMSNorm over the channels of all heads at once; a tensor-parallel rank has those of its own.

    Megatron calls q's and k's norm one after the other, and so each leaves its input as it is: the attention takes both
    at once (`normed_across_heads`).
    """

    def __init__(self, config: TransformerConfig, num_heads: int) -> None:
        """num_heads: of all ranks together."""
        super().__init__()
        assert config.kv_channels is not None
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.channels = num_heads * config.kv_channels
        self.weight = torch.nn.Parameter(
            torch.empty(self.channels // ranks, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x

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

    def get_query_key_value_tensors(self, *args, **kwargs) -> tuple[Tensor, ...]:
        """As Megatron's, [S, B, N, D] each; one all-reduce for both norms where its ranks have heads each."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        norms = (self.q_layernorm, self.k_layernorm)
        return (*normed_across_heads((query, key), norms, self.config.layernorm_epsilon), *rest)


def normed_across_heads(
    tensors_SBND: Sequence[Tensor], norms: Sequence[AcrossHeadsRMSNorm], eps: float
) -> list[Tensor]:
    """Each by its norm, in its shape and dtype; sums are in fp32, and those of all are one over the ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    flat, weights = [x_SBND.flatten(-2) for x_SBND in tensors_SBND], [norm.weight for norm in norms]
    if group.size() == 1:
        normed = [F.rms_norm(x, weight.shape, weight, eps) for x, weight in zip(flat, weights, strict=True)]
    else:
        normed = _NormsOverRanks.apply(group, eps, [norm.channels for norm in norms], *flat, *weights)
    return [y.view_as(x) for y, x in zip(normed, tensors_SBND, strict=True)]


class _NormsOverRanks(torch.autograd.Function):
    """RMSNorms of N tensors whose channels lie on several ranks: all-reduces a number a token and tensor, in each pass.

    y = w x r with r = (sum(x^2) / C + eps)^(-1/2); so dx = r (w dy - x r^2 / C sum(w dy x)) and dw = sum(dy x r), with
    sums over the C channels of all ranks, and over tokens. What is kept are inputs in their own dtype, and r.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, eps: float, channels: Sequence[int], *tensors: Tensor):
        ctx.group, ctx.channels = group, channels
        xs, weights = tensors[: len(channels)], tensors[len(channels) :]
        squares = torch.stack([x.float().square().sum(-1, keepdim=True) for x in xs])
        dist.all_reduce(squares, group=group)
        scales = [torch.rsqrt(square / count + eps) for square, count in zip(squares, channels, strict=True)]
        ctx.save_for_backward(*tensors, *scales)
        return tuple((x * r * w.float()).to(x.dtype) for x, r, w in zip(xs, scales, weights, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        count = len(ctx.channels)
        xs, weights, scales = (ctx.saved_tensors[i * count : (i + 1) * count] for i in range(3))
        weighted = [dy * w.float() for dy, w in zip(gradients, weights, strict=True)]
        sums = torch.stack([(wdy * x).sum(-1, keepdim=True) for wdy, x in zip(weighted, xs, strict=True)])
        dist.all_reduce(sums, group=ctx.group)
        of_inputs = [
            (r * (wdy - x * (r.square() * total / channels))).to(x.dtype)
            for x, r, wdy, total, channels in zip(xs, scales, weighted, sums, ctx.channels, strict=True)
        ]
        of_weights = [
            (dy * (x * r)).flatten(0, -2).sum(0).to(w.dtype) if learns else None
            for dy, x, r, w, learns in zip(gradients, xs, scales, weights, ctx.needs_input_grad[-count:], strict=True)
        ]
        return None, None, None, *of_inputs, *of_weights


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
