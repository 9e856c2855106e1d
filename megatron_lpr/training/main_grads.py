"""Gradients in bfloat16 added to fp32 sums on a CPU.

Megatron's DDP adds a parameter's gradient to its `main_grad` in one operation. Where the two differ in precision torch
first makes a copy of the gradient in fp32, of the size of the weight, in memory that it has to ask for each time.
"""

from collections.abc import Iterable

import torch

AT_ONCE = 1 << 17  # numbers, whose copy stays in a core's cache


def add_in_parts(chunks: Iterable[torch.nn.Module]) -> None:
    """Have each gradient of another precision added a part at a time, and leave none to the hook of Megatron's DDP.

    chunks: whose reductions do not overlap the backward pass, for then that hook wants to see a gradient.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad and parameter.dtype is not torch.float32 and not parameter.is_cuda:
                parameter.register_post_accumulate_grad_hook(_add)


def _add(parameter: torch.Tensor) -> None:
    if parameter.grad is None or parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
        return  # a layer has added it to the sum itself
    into, gradient = parameter.main_grad.view(-1), parameter.grad.reshape(-1)  # type: ignore[attr-defined]
    for sums, part in zip(into.split(AT_ONCE), gradient.split(AT_ONCE), strict=True):
        sums.add_(part)
    parameter.grad = None
