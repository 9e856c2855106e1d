"""Work that may run on a second stream of the GPU, beside what the main one does in the meantime.

A kernel starts when those before it on its own stream are done: while tokens travel between GPUs, or small kernels
leave most of a GPU idle, the main stream lets nothing else through. Where several streams share tensors there are three
things to get right. A stream must wait for what another one computes for it; in the backward pass PyTorch sees to that
and runs each operation on the stream of its forward. And memory that is let go of is given out again in the order of
the stream that it was taken on: nobody may let go of a tensor that another stream still reads, as PyTorch does with
what an operation saved when it has launched the kernels of its backward pass. And PyTorch adds up gradients in place
where it holds the only reference: to one that the side stream still reads there must be a second.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Work = Callable[..., Tensor]


class InTurn:
    """Work on the main stream, when its output is asked for."""

    def __init__(self, *inputs: Tensor) -> None:
        self._inputs = inputs

    def start(self, work: Work) -> None:
        """Give the work, which takes the inputs."""
        self._work = work

    def output(self) -> Tensor:
        """What the work computes of its inputs."""
        return self._work(*self._inputs)


class Beside(InTurn):
    """Work on the side stream, which waits for nothing but what the main stream was given before this object was made.

    It holds its inputs until the main stream has waited for its output. The output's memory, the side stream's, is
    taken again by later work here or in a backward pass, which waits for the main stream first.
    """

    def __init__(self, *inputs: Tensor) -> None:
        self._still_read: list[Tensor] = []
        super().__init__(*_Fork.apply(self._still_read, *inputs))
        self._side = _side_stream()
        self._side.wait_stream(torch.cuda.current_stream())

    def start(self, work: Work) -> None:
        """Queue the work, which takes the inputs."""
        with torch.cuda.stream(self._side):
            self._output = work(*self._inputs)

    def output(self) -> Tensor:
        """The output, for which the main stream waits and the host does not."""
        torch.cuda.current_stream().wait_stream(self._side)
        return _Join.apply(self._still_read, self._output)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all layers: PyTorch keeps free memory apart for each stream."""
    return torch.cuda.Stream()


class _Fork(torch.autograd.Function):
    """The inputs; in the backward pass the main stream goes on with none of their gradients before it has all.

    What comes before, the router, multiplies matrices with Transformer Engine, whose products outside of groups share
    one workspace: none of them may run beside one of the side stream.
    """

    @staticmethod
    def forward(ctx, still_read: list[Tensor], *inputs: Tensor):
        ctx.set_materialize_grads(False)
        ctx.still_read = still_read
        still_read.extend(inputs)
        views = tuple(tensor.view_as(tensor) for tensor in inputs)
        ctx.mark_non_differentiable(
            *(view for view, needed in zip(views, ctx.needs_input_grad[1:], strict=True) if not needed)
        )
        return views

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        ctx.still_read.clear()  # the main stream has waited for the side stream
        return None, *gradients


class _Join(torch.autograd.Function):
    """The output; in the backward pass its gradient, which the sum that it came from may have handed to others too."""

    @staticmethod
    def forward(ctx, still_read: list[Tensor], output: Tensor):
        ctx.still_read = still_read
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.still_read.append(gradient)
        return None, gradient
