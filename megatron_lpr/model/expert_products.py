"""Products of tokens, sorted by expert, with the weights of their experts: one operation of autograd for all experts.

On a GPU it is torch's grouped product, which wants the weights in one tensor: they are copied together for each
product, and not kept for the backward pass. On a CPU it is a matrix product for each expert, written where its rows
belong.
Shapes: T tokens of all experts in their order, N experts, I inputs, O outputs; rows up to ends[n] are expert n's, from
those of the expert before on.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

grouped_mm: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)  # older versions of torch have none


class ExpertLinear(torch.autograd.Function):
    """[T, I], ends [N] int32 (where the product is one kernel, on its device), N weights [O, I] -> [T, O].

    Weights that do not learn have no product for their gradient, and the input is not kept for one.
    """

    @staticmethod
    def forward(ctx, x_TI: Tensor, ends_N: Tensor, *weights_OI: Tensor) -> Tensor:
        learns = any(weight.requires_grad for weight in weights_OI)
        ctx.ends_N = ends_N
        ctx.save_for_backward(x_TI if learns else None, *weights_OI)
        return _products(x_TI, ends_N, weights_OI, transposed=True)

    @staticmethod
    def backward(ctx, grad_TO: Tensor):
        x_TI, *weights_OI = ctx.saved_tensors
        ends_N, grad_TO, grad_TI = ctx.ends_N, grad_TO.contiguous(), None
        grads_OI: Sequence[Tensor | None] = (None,) * len(weights_OI)
        if ctx.needs_input_grad[0]:
            grad_TI = _products(grad_TO, ends_N, weights_OI)
        if x_TI is not None:
            grads_OI = _weight_gradients(grad_TO, x_TI, ends_N)
        return grad_TI, None, *grads_OI


def in_one_kernel(x: Tensor) -> bool:
    return x.is_cuda


def _products(x: Tensor, ends_N: Tensor, weights: Sequence[Tensor], *, transposed: bool = False) -> Tensor:
    """The rows of each expert times its weight."""
    if in_one_kernel(x):
        assert grouped_mm is not None
        stack = torch.stack(list(weights))
        return grouped_mm(x, stack.transpose(1, 2) if transposed else stack, offs=ends_N)
    factors = [weight.t() if transposed else weight for weight in weights]
    output = x.new_empty(len(x), factors[0].shape[1])
    for rows, factor in zip(_slices(ends_N), factors, strict=True):
        torch.mm(x[rows], factor, out=output[rows])
    return output


def _weight_gradients(grad_TO: Tensor, x_TI: Tensor, ends_N: Tensor) -> Sequence[Tensor]:
    """N of [O, I]; zeros of an expert without rows."""
    if in_one_kernel(x_TI):
        assert grouped_mm is not None
        return grouped_mm(grad_TO.t(), x_TI, offs=ends_N).unbind()
    return [torch.mm(grad_TO[rows].t(), x_TI[rows]) for rows in _slices(ends_N)]


def _slices(ends_N: Tensor) -> Iterable[slice]:
    return itertools.starmap(slice, itertools.pairwise([0, *ends_N.tolist()]))
