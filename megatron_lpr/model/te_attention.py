"""Transformer Engine's core attention over documents that do not see each other.

Only models with Transformer Engine's modules import it. Its kernels for packed documents want each of them to be cut
evenly over context-parallel ranks, which no corpus offers: there torch's attention computes them, with a mask.

Shapes: S positions, B sequences, N heads and G key/value groups
of this tensor-parallel rank, D head size, K documents of all sequences, T = B * S positions.
"""

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_lpr.model.attention import SDPACoreAttention


class TEDocumentAttention(TEDotProductAttention):
    """Causal attention inside each document: its kernels skip what lies between documents, and build no mask."""

    def __init__(self, config: TransformerConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        kwargs.pop("cp_comm_type", None)
        self.over_context = SDPACoreAttention(config, *args, **kwargs) if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D], documents (passengers.py) -> [S, B, N*D]."""
        if documents is None:
            return super().forward(query, key, value, None, attn_mask_type, attention_bias, packed_seq_params, **kwargs)
        assert attention_bias is None and packed_seq_params is None
        if self.over_context is not None:
            return self.over_context(query, key, value, documents)
        length, batch = query.shape[:2]
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=documents,
            cu_seqlens_kv=documents,
            max_seqlen_q=length,  # the longest document may be shorter, but to know it would be to wait for the device
            max_seqlen_kv=length,
        )
        qkv = (x.transpose(0, 1).reshape(batch * length, *x.shape[2:]) for x in (query, key, value))
        out_T = super().forward(*qkv, None, attn_mask_type, packed_seq_params=packed, **kwargs)
        return out_T.reshape(batch, length, -1).transpose(0, 1).contiguous()
