"""Tensors of shapes without memory, but for the routing, which decides shapes.

torch's FakeTensorMode (2.13) computes shapes and nothing else. A few tensors of a step are read by the host: the
routing map and the counts that come from it. They are real here and stay real among themselves; what meets a fake
tensor is fake. A scalar that the host reads from a fake tensor, the gradient's norm, is one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.transformer.moe import token_dispatcher
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lpr.model.dispatchers import DISPATCHERS

aten, c10d = torch.ops.aten, torch.ops.c10d
# torch (2.13) answers the other collectives for tensors without memory, these not
_UNANSWERED = {
    c10d.allreduce_coalesced_.default,
    c10d.allgather_into_tensor_coalesced_.default,
    c10d.reduce_scatter_tensor_coalesced_.default,
}


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside it tensors have no memory."""
    _need_no_values()
    with FakeTensorMode(allow_non_fake_inputs=True), _RealStaysReal():
        yield


@functools.cache
def _need_no_values() -> None:
    """What reads values for shapes is exchanged, for good: fake tensors are for processes that do nothing else."""
    _keep_dispatchers_real()
    # torch (2.13) would put other parameters into the places of fake ones, without the marks that Megatron gave them
    setattr(torch.nn.Module, "bfloat16", _to_bfloat16)  # noqa: B010
    # Megatron (0.16.1 to 0.19.2) makes one tensor of a list of norms, whose values it reads one by one
    clip_grads.l2_norm_impl = lambda chunk, overflow, lists, *rest: (lists[0][0].norm(), None)


class _RealStaysReal(TorchDispatchMode):
    """Operations on real tensors alone are computed; those whose result the host or a shape needs are answered."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fake = [x for x in tensors if isinstance(x, FakeTensor)]
        if tensors and not fake:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _UNANSWERED:
            return FakeWork().boxed()
        if func is aten._local_scalar_dense.default and args[0].is_floating_point():
            return 1.0
        if func is aten.masked_select.default and not isinstance(args[1], FakeTensor):
            with unset_fake_temporarily():
                chosen = int(args[1].expand(args[0].shape).sum())
            return args[0].new_empty(chosen)
        return func(*args, **kwargs)


def _to_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.dtype is not torch.bfloat16:
            tensor.data = tensor.data.bfloat16()
    return module


def _keep_dispatchers_real() -> None:
    """The order of experts that a dispatcher makes for itself, and the counts that it gathers from other ranks."""
    for dispatcher in DISPATCHERS.values():
        dispatcher.__init__ = _outside_fake_mode(dispatcher.__init__)
    gather = token_dispatcher.gather_from_sequence_parallel_region
    really_gather = _outside_fake_mode(gather)

    def gather_as_it_is(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (gather if isinstance(x, FakeTensor) else really_gather)(x, *args, **kwargs)

    token_dispatcher.gather_from_sequence_parallel_region = gather_as_it_is


def _outside_fake_mode(function: Callable) -> Callable:
    def outside(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return outside
