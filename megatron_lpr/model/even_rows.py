"""Rows of zeros after the tokens of each expert, so that its products have one of few numbers of rows.

oneDNN compiles a product in bfloat16 anew for each number of rows that it has not met, which takes as long as the
product of some hundred rows, and forgets those that it has not met for a while.
Shapes: T tokens of all experts in their order, R >= T rows with the zeros, N experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MULTIPLE = 16


class EvenRows:
    """Where the tokens of each expert lie among zeros; `rows_N`: how many rows each has then."""

    def __init__(self, tokens_N: Tensor) -> None:
        self.rows_N = (tokens_N + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        padding_N = self.rows_N - tokens_N
        before_N = padding_N.cumsum(0) - padding_N
        total = int(self.rows_N.sum())
        self.places_T = torch.arange(total - int(padding_N.sum())) + before_N.repeat_interleave(tokens_N)
        is_token_R = torch.zeros(total, dtype=torch.bool).index_fill_(0, self.places_T, True)
        self.tokens_R = is_token_R.cumsum(0).clamp_(min=1) - 1  # of a row of zeros any
        self.zeros = is_token_R.logical_not().nonzero()[:, 0]

    def spread(self, x: Tensor) -> Tensor:
        """[T, ...] -> [R, ...]."""
        return _Moved.apply(x, self._spread, self._gather)

    def gather(self, x: Tensor) -> Tensor:
        """[R, ...] -> [T, ...]."""
        return _Moved.apply(x, self._gather, self._spread)

    def _spread(self, x: Tensor) -> Tensor:
        # several times as fast as torch's copy by index into zeros
        return x.index_select(0, self.tokens_R).index_fill_(0, self.zeros, 0)

    def _gather(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.places_T)


class _Moved(torch.autograd.Function):
    """Rows are moved there; their gradients are moved back."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad), None, None
