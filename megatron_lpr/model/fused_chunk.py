"""A chunk of the output layer's loss on a GPU: two passes over its logits, which stay in the product's dtype.

In PyTorch's operations each step of the softmax reads and writes all logits in fp32, some 46 bytes a logit; here it is
6: one pass reads them for the sums, a second one puts the gradient in their place. As in Liger (arXiv 2410.10989).
Triton comes with PyTorch for CUDA. Shapes: C tokens, V columns of this rank.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _sums(logits, labels, maxima, sums, of_labels, columns, width, first, BLOCK: tl.constexpr):
    """Of each row: the largest logit, the sum of exp(logit - largest), and the logit of the label, 0 if not here."""
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * width
    largest = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(begin + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    label = tl.load(labels + row) - first
    is_here = (label >= 0) & (label < columns)
    of_label = tl.load(begin + label, mask=is_here, other=0.0).to(tl.float32)
    tl.store(maxima + row, largest)
    tl.store(sums + row, total)
    tl.store(of_labels + row, of_label)


@triton.jit
def _gradient(logits, labels, maxima, sums, factors, columns, width, first, BLOCK: tl.constexpr):
    """(softmax - one-hot of the label) * factor, in place of the logits; 0 for padding."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * width + column
    x = tl.load(place, mask=column < columns, other=-float("inf")).to(tl.float32)
    softmax = tl.exp(x - tl.load(maxima + row)) / tl.load(sums + row)
    is_label = column == tl.load(labels + row) - first
    gradient = tl.where(is_label, softmax - 1.0, softmax) * tl.load(factors + row)
    tl.store(place, tl.where(column < columns, gradient, 0.0), mask=column < width)


class FusedChunk:
    """As `Chunk` of output_layer.py; the gradient takes the place of the logits."""

    def __init__(self, x_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, shard) -> None:
        self._logits_CV = x_CH @ weight_VH.t()
        self._labels_C, self._shard = labels_C, shard
        rows, self._width = self._logits_CV.shape
        self._columns = min(shard.true, self._width)
        largest_C, of_label_C, sum_C = torch.empty(3, rows, device=x_CH.device)
        with torch.cuda.device(x_CH.device):
            _sums[(rows,)](
                self._logits_CV,
                labels_C,
                largest_C,
                sum_C,
                of_label_C,
                self._columns,
                self._width,
                shard.first,
                BLOCK=BLOCK,
                num_warps=8,
            )
        if shard.group.size() > 1:
            own_C = largest_C.clone()
            dist.all_reduce(largest_C, dist.ReduceOp.MAX, shard.group)
            both_2C = torch.stack([of_label_C, sum_C * (own_C - largest_C).exp()])
            dist.all_reduce(both_2C, dist.ReduceOp.SUM, shard.group)
            of_label_C, sum_C = both_2C
        self._largest_C, self._sum_C = largest_C, sum_C
        self.losses_C = sum_C.log() + largest_C - of_label_C

    def gradient_CV(self, factor_C: Tensor | None = None) -> Tensor:
        """d losses / d logits * factor (None: 1), in the weight's dtype."""
        factor_C = torch.ones_like(self.losses_C) if factor_C is None else factor_C
        rows = len(self._logits_CV)
        with torch.cuda.device(self._logits_CV.device):
            _gradient[(rows, triton.cdiv(self._width, BLOCK))](
                self._logits_CV,
                self._labels_C,
                self._largest_C,
                self._sum_C,
                factor_C,
                self._columns,
                self._width,
                self._shard.first,
                BLOCK=BLOCK,
                num_warps=8,
            )
        return self._logits_CV
