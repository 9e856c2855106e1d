"""The output layer with the loss behind it, where the logits of all tokens at once would be too many.

The logits of a micro-batch of 8,192 tokens over Llama 3's vocabulary take 4.2 GB in fp32, and several copies of that
are made of them: of Megatron's product, in fp32, as softmax, as gradient. Here the tokens go through product and loss a
chunk at a time. Where the weight is frozen, as in both stages of the method, the gradient of the hidden states needs no
more than the softmax of the chunk, and is computed along with it, as in Cut Cross-Entropy (arXiv 2411.09009) and Liger
(arXiv 2410.10989); where the weight learns, the backward pass computes the chunk's logits once more.

Shapes: T tokens, C tokens of a chunk, B sequences, S positions, H hidden, V columns of the (padded) vocabulary on this
tensor-parallel rank.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_lpr.model.loss_chunks import CHUNK_BYTES, rows_at_once


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """The columns of a rank: `first` to `first` + V, of which those from `true` on are padding."""

    first: int
    true: int
    group: dist.ProcessGroup


class OutputLayer(ColumnParallelLinear):
    """Megatron's; with `labels_BS`, what it returns is the token losses [B, S] where their logits are many."""

    true_vocab_size: int
    labels_BS: Tensor | None = None  # of the forward pass that is going on

    def forward(self, input_: Tensor, weight: Tensor | None = None, *args, **kwargs):
        weight_VH = self.weight if weight is None else weight
        tokens = 0 if self.labels_BS is None else self.labels_BS.numel()
        columns = len(weight_VH)
        rows = rows_at_once(tokens, columns, CHUNK_BYTES)
        if rows == tokens:
            return super().forward(input_, weight, *args, **kwargs)
        assert self.labels_BS is not None
        first = self.tp_group.rank() * columns
        shard = VocabularyShard(first=first, true=max(0, self.true_vocab_size - first), group=self.tp_group)
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        losses_T = ChunkedLoss.apply(input_.flatten(0, 1), weight_VH, self.labels_BS.t().flatten(), shard, rows)
        return losses_T.view(input_.shape[:2]).t().contiguous(), None


class ChunkedLoss(torch.autograd.Function):
    """(hidden states [T, H], weight [V, H], labels [T], ...) -> token losses [T] in fp32."""

    @staticmethod
    def forward(ctx, x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, shard: VocabularyShard, rows: int) -> Tensor:
        ctx.shard, ctx.rows = shard, rows
        losses_T = torch.empty(len(x_TH), device=x_TH.device)
        needs_x, ctx.needs_weight = ctx.needs_input_grad[:2]
        grad_TH = torch.empty_like(x_TH) if needs_x and not ctx.needs_weight else None
        for part in _parts(len(x_TH), rows):
            chunk = _chunk(x_TH[part], weight_VH, labels_T[part], shard)
            losses_T[part] = chunk.losses_C
            if grad_TH is not None:
                torch.mm(chunk.gradient_CV(), weight_VH, out=grad_TH[part])
            del chunk  # before the next one is made
        ctx.save_for_backward(*((x_TH, weight_VH, labels_T) if ctx.needs_weight else (grad_TH,)))
        return losses_T

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        if not ctx.needs_weight:
            (grad_TH,) = ctx.saved_tensors
            return (grad_TH * grad_T[:, None]).to(grad_TH.dtype), None, None, None, None
        x_TH, weight_VH, labels_T = ctx.saved_tensors
        grad_TH = torch.empty_like(x_TH)
        grad_VH = torch.zeros(weight_VH.shape, device=x_TH.device)  # the sum over many chunks, in fp32
        for part in _parts(len(x_TH), ctx.rows):
            chunk = _chunk(x_TH[part], weight_VH, labels_T[part], ctx.shard)
            grad_CV = chunk.gradient_CV(grad_T[part].contiguous())
            torch.mm(grad_CV, weight_VH, out=grad_TH[part])
            grad_VH += grad_CV.t() @ x_TH[part]
            del chunk, grad_CV
        return grad_TH, grad_VH.to(weight_VH.dtype), None, None, None


def _parts(tokens: int, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _chunk(x_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, shard: VocabularyShard) -> Any:
    if x_CH.is_cuda and importlib.util.find_spec("triton"):
        from megatron_lpr.model.fused_chunk import FusedChunk

        return FusedChunk(x_CH, weight_VH, labels_C, shard)
    return Chunk(x_CH, weight_VH, labels_C, shard)


class Chunk:
    """The losses of some tokens, and then their gradients: -log softmax(logits)[label], with sums in fp32.

    The arithmetic is that of Megatron's vocab_parallel_cross_entropy, in place.
    """

    def __init__(self, x_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, shard: VocabularyShard) -> None:
        logits_CV = (x_CH @ weight_VH.t()).float()
        logits_CV[:, shard.true :] = -torch.inf  # padding is no token
        max_C = logits_CV.amax(-1)
        _all_reduce(max_C, shard, dist.ReduceOp.MAX)
        logits_CV -= max_C[:, None]
        self._dtype = weight_VH.dtype
        self._is_here_C = (labels_C >= shard.first) & (labels_C < shard.first + len(weight_VH))
        self._column_C1 = torch.where(self._is_here_C, labels_C - shard.first, 0)[:, None]
        of_label_C = torch.where(self._is_here_C, logits_CV.gather(1, self._column_C1)[:, 0], 0.0)
        self._exp_CV = logits_CV.exp_()
        sums_2C = torch.stack([of_label_C, self._exp_CV.sum(-1)])
        _all_reduce(sums_2C, shard, dist.ReduceOp.SUM)
        of_label_C, self._sum_C = sums_2C
        self.losses_C = self._sum_C.log() - of_label_C

    def gradient_CV(self, factor_C: Tensor | None = None) -> Tensor:
        """d losses / d logits = softmax - one-hot of the label, * factor (None: 1), in the weight's dtype.

        Called once, for it takes the place of the logits.
        """
        grad_CV = self._exp_CV.div_(self._sum_C[:, None])
        grad_CV.scatter_add_(1, self._column_C1, -self._is_here_C[:, None].float())
        if factor_C is not None:
            grad_CV.mul_(factor_C[:, None])
        return grad_CV.to(self._dtype)


def _all_reduce(tensor: Tensor, shard: VocabularyShard, op) -> None:
    if shard.group.size() > 1:
        dist.all_reduce(tensor, op, shard.group)
