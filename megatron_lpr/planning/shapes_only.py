"""Tensors of shapes without memory, but for the routing, which decides shapes.

They are on torch's `meta` device, whatever device they are made for. A few tensors of a step are read by the host: the
routing map and the counts that come from it. They are real here and stay real among themselves; what meets a tensor
without memory has none either. A scalar that the host reads of one, the gradient's norm, is 1. torch's FakeTensorMode
(2.13) would do the same, and takes five times as long for an operator.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.optimizer import clip_grads
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lpr.model.dispatchers import DISPATCHERS

aten = torch.ops.aten
_META = torch.device("meta")
_wanted_real = False


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside it tensors have no memory."""
    _need_no_values()
    with mock.patch.object(F, "scaled_dot_product_attention", _attention), _ShapesOnly():
        yield


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Inside it new tensors have memory after all."""
    global _wanted_real
    before, _wanted_real = _wanted_real, True
    try:
        yield
    finally:
        _wanted_real = before


class _ShapesOnly(TorchDispatchMode):
    """Operations on real tensors alone are computed; of others the results' shapes are, once for equal inputs."""

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[Any, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a DTensor, which asks again for its part
        kwargs = kwargs or {}
        tensors = [x for x in _leaves(args, kwargs) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in tensors):
            if not tensors and not _wanted_real and _takes_device(func):
                kwargs["device"] = _META
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func is aten._local_scalar_dense.default and args[0].is_floating_point():
            return 1.0
        if func is aten.masked_select.default and not args[1].is_meta:
            return args[0].new_empty(int(args[1].expand(args[0].shape).sum()))
        if kwargs.get("device") is not None:
            kwargs["device"] = _META
        if not all(x.is_meta for x in tensors):
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(_META), (args, kwargs))
        return self._result(func, args, kwargs) if _makes_one_tensor(func) else func(*args, **kwargs)

    def _result(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        key = (func, *(_described(x) for x in (*args, *kwargs, *kwargs.values())))
        if key not in self._results:
            result = func(*args, **kwargs)
            self._results[key] = (result.shape, result.stride(), result.dtype)
            return result
        shape, stride, dtype = self._results[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device=_META)


def _leaves(*values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(*value)
        elif isinstance(value, dict):
            yield from _leaves(*value.values())
        else:
            yield value


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_described(x) for x in value)
    return type(value), value


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


@functools.cache
def _makes_one_tensor(func: Any) -> bool:
    """A new one, that shares memory with no input."""
    schema = func._schema
    together = (*schema.arguments, *schema.returns)
    is_one = len(schema.returns) == 1 and isinstance(schema.returns[0].type, torch.TensorType)
    return is_one and not any(x.alias_info for x in together) and func.namespace == "aten"


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, is_causal=False, scale=None) -> Tensor:
    """By the kernel that a CPU takes, which does not keep the scores; on the `meta` device torch would keep them."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype)
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


@functools.cache
def _need_no_values() -> None:
    """What reads values for shapes is exchanged, for good: a rehearsal is for processes that do nothing else."""
    _keep_dispatchers_real()
    # FSDP2 (torch 2.13) takes a parameter without memory for one that was forgotten
    setattr(FSDPParamGroup, "_validate_no_meta_params", lambda group: None)  # noqa: B010
    # Megatron (0.16.1 to 0.19.2) makes one tensor of a list of norms, whose values it reads one by one
    clip_grads.l2_norm_impl = lambda chunk, overflow, lists, *rest: (lists[0][0].norm(), None)


def _keep_dispatchers_real() -> None:
    """The order of experts that a dispatcher makes for itself, and the counts that it gathers from other ranks."""
    for dispatcher in DISPATCHERS.values():
        dispatcher.__init__ = real_tensors()(dispatcher.__init__)
    gather = token_dispatcher.gather_from_sequence_parallel_region
    really_gather = real_tensors()(gather)

    def gather_as_it_is(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (gather if x.is_meta else really_gather)(x, *args, **kwargs)

    token_dispatcher.gather_from_sequence_parallel_region = gather_as_it_is
