"""Causal core attention through torch's scaled_dot_product_attention.

Megatron's local attention materialises all scores [batch, heads, seq, seq]; torch's kernels do not, on CPU and GPU.
It also refuses context parallelism; here a rank gathers the keys and values of the whole sequence for its own queries.
Shapes: S positions, B sequences, N heads and G key/value groups of this tensor-parallel rank, D head size; with
context parallelism S are the positions of this rank (see `context_parallel`), K those of a prefix of the sequence.
Document numbers are those of the whole sequence in any case: [B, K], and of the prefix the first of them.
"""

from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_lpr.platform.context_parallel import in_order, rank_chunks


class SDPACoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(D)) v over earlier positions, or the window of them that `config.window_size` says.

    No dropout, no key/value cache.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        *,
        pg_collection,
        **kwargs,
    ) -> None:
        super().__init__(config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout)
        self.softmax_scale = softmax_scale
        self.window = config.window_size[0] + 1 if config.window_size else None  # positions, the query's own included
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents_BK: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        **kwargs,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N*D].

        The mask is causal. With document numbers (passengers.py) a position attends to those of its own document only.
        As rotary embeddings know distances alone, each document is then computed as if it stood alone at position 0.
        """
        assert attention_bias is None and packed_seq_params is None
        if self.cp_group.size() == 1:
            return self._attend(query, key, value, documents_BK)
        key, value = self._gather_keys_and_values(key, value)
        outputs = []
        for chunk, queries in zip(rank_chunks(self.cp_group.rank(), self.cp_group.size()), query.chunk(2), strict=True):
            visible = (chunk + 1) * len(queries)
            outputs.append(self._attend(queries, key[:visible], value[:visible], documents_BK))
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, documents_BK: Tensor | None) -> Tensor:
        """query [S, B, N, D], key and value [K, B, G, D] -> [S, B, N*D]; the queries are the last S of K positions."""
        q_BNSD, k_BGKD, v_BGKD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        repeats = q_BNSD.shape[1] // k_BGKD.shape[1]
        if repeats > 1:
            k_BGKD, v_BGKD = (x.repeat_interleave(repeats, dim=1) for x in (k_BGKD, v_BGKD))
        if self.window is not None and self.window < len(key):
            out_BNSD = self._attend_within_window(q_BNSD, k_BGKD, v_BGKD, self.window, documents_BK)
        else:
            # torch's own causal mask is aligned at the first query and the first key
            mask: Tensor | None = None if len(query) == len(key) else causal_lower_right(len(query), len(key))
            if documents_BK is not None:
                mask = _within_documents(documents_BK, len(query), len(key), query.dtype)
            out_BNSD = F.scaled_dot_product_attention(
                q_BNSD, k_BGKD, v_BGKD, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
            )
        return out_BNSD.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _attend_within_window(
        self, q_BNSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, window: int, documents_BK: Tensor | None
    ) -> Tensor:
        """[B, N, S, D]; a window's worth of queries at a time, which see two windows' worth of keys at most."""
        length, before = q_BNSD.shape[2], k_BNKD.shape[2] - q_BNSD.shape[2]
        outputs = []
        for start in range(0, length, window):
            stop = min(start + window, length)
            first, last = max(0, before + start - window + 1), before + stop
            query_S1 = torch.arange(before + start, last, device=q_BNSD.device)[:, None]
            key_K = torch.arange(first, last, device=q_BNSD.device)
            mask = (key_K <= query_S1) & (key_K > query_S1 - window)
            if documents_BK is not None:
                same_BSK = documents_BK[:, before + start : last, None] == documents_BK[:, None, first:last]
                mask = (mask & same_BSK).unsqueeze(1)
            outputs.append(
                F.scaled_dot_product_attention(
                    q_BNSD[:, :, start:stop],
                    k_BNKD[:, :, first:last],
                    v_BNKD[:, :, first:last],
                    attn_mask=mask,
                    scale=self.softmax_scale,
                )
            )
        return torch.cat(outputs, dim=2)

    def _gather_keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the whole sequence, in its order; the backward pass sums their gradients over the ranks."""
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
        key, value = in_order(both, self.cp_group.size()).split([key.shape[-1], value.shape[-1]], dim=-1)
        return key, value


# by document numbers, for as long as somebody has these
_masks: MutableMapping[Tensor, dict[tuple[int, int, torch.dtype], Tensor]] = WeakTensorKeyDictionary()


def _within_documents(documents_BK: Tensor, queries: int, visible: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores that the last S of K positions give to all: 0, or -inf where they shall not look.

    [B, 1, S, K] in the dtype of the queries, which torch would make of any other in each layer. All layers of a
    micro-batch get the same tensor, for each keeps it until the backward pass.
    """
    masks = _masks.setdefault(documents_BK, {})
    if (queries, visible, dtype) not in masks:
        first = visible - queries
        sees_BSK = (documents_BK[:, first:visible, None] == documents_BK[:, None, :visible]).tril(first)
        added_BSK = torch.zeros(sees_BSK.shape, dtype=dtype, device=sees_BSK.device)
        masks[queries, visible, dtype] = added_BSK.masked_fill_(sees_BSK.logical_not(), -torch.inf).unsqueeze(1)
    return masks[queries, visible, dtype]
