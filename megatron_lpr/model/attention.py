"""Causal core attention through torch's scaled_dot_product_attention.

Megatron's local attention materialises all scores [batch, heads, seq, seq]; torch's kernels do not, on CPU and GPU.
Shapes: S positions, B sequences, N heads and G key/value groups of this tensor-parallel rank, D head size.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SDPACoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(D)) v over earlier positions; no dropout, no key/value cache."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs,
    ) -> None:
        super().__init__(config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        **kwargs,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N*D]. The mask is causal, whatever is passed."""
        assert attention_bias is None and packed_seq_params is None
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        repeats = q_BNSD.shape[1] // k_BGSD.shape[1]
        if repeats > 1:
            k_BGSD, v_BGSD = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSD, v_BGSD))
        out_BNSD = F.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, is_causal=True, scale=self.softmax_scale
        )
        return out_BNSD.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; Megatron's WrappedTorchNorm refuses sequence parallelism, this one marks its weight for it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel
