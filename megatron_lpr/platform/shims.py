"""What unmodified Megatron-Core (0.16.1 to 0.19) needs to run here, each with its reason.

Without CUDA: Megatron names the CUDA device, streams and events without asking whether there are any. A shim stands in
for each such name with what is true on a CPU: one device, one queue, everything finished when the call returns. None
of these is installed where there is a GPU. Everywhere: faults of released versions that every run would meet.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"` and pinned memory in factory calls (clip_grads, optimizer, rope) mean the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))


class _CudaTypeNames(TorchFunctionMode):
    """`tensor.type()` as on a GPU: Megatron's optimizers accept 'torch.cuda.FloatTensor' only."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + func(*args).split(".")[-1]
        return func(*args, **(kwargs or {}))


def cuda_type_names() -> contextlib.AbstractContextManager:
    """Inside it Megatron's optimizers accept CPU parameters; without effect where there is a GPU."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaTypeNames()


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Event:
        return _Event()


def stand_in_for_cuda() -> None:
    """Before the import of Megatron: replace the names that it uses in `torch.cuda`, and what gloo lacks."""
    cpu = torch.device("cpu")
    _replace(
        torch.cuda,
        current_device=lambda: cpu,
        # one function object per name: torch._dynamo refuses the same object under two names
        set_device=lambda *a, **k: None,
        synchronize=lambda *a, **k: None,
        current_stream=lambda *a, **k: _Stream(),
        default_stream=lambda *a, **k: _Stream(),
        Stream=_Stream,
        Event=_Event,
        stream=lambda stream: contextlib.nullcontext(),
        manual_seed=lambda seed: torch.manual_seed(seed),
        get_rng_state=lambda *a, **k: torch.get_rng_state(),
        set_rng_state=lambda state, *a, **k: torch.set_rng_state(state),
    )
    _replace(torch.cuda.nvtx, range_push=lambda *a, **k: None, range_pop=lambda *a, **k: None)
    _replace(torch.cuda.random, get_rng_state=lambda *a, **k: torch.get_rng_state())
    _let_gloo_take_tensor_splits()
    _let_gloo_take_unequal_parts()
    _leave_gloo_out_where_a_rank_is_alone()

    # Megatron compiles small helpers with torch.compile, which on a CPU costs seconds each and gains nothing
    from megatron.core import jit

    jit.disable_jit_fuser()


def let_cuda_mean_cpu() -> None:
    """In this thread, from now on."""
    _CudaMeansCpu().__enter__()


def _replace(owner: Any, **stand_ins: Any) -> None:
    for name, stand_in in stand_ins.items():
        setattr(owner, name, stand_in)


def _let_gloo_take_tensor_splits() -> None:
    """The alltoall dispatcher passes split sizes as tensors, which NCCL takes and gloo does not."""
    plain = dist.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        def as_list(sizes):
            return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

        return plain(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs)

    _replace(dist, all_to_all_single=all_to_all_single)


def _let_gloo_take_unequal_parts() -> None:
    """Tensor parallelism inside experts gathers and scatters the tokens of each rank; gloo wants equal parts."""
    plain_gather, plain_scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(parts, part, group=None, async_op=False):
        if len({p.shape for p in parts}) == 1:
            return plain_gather(parts, part, group, async_op)
        parts[dist.get_rank(group)].copy_(part)
        for source, p in enumerate(parts):
            dist.broadcast(p, group=group, group_src=source)

    def reduce_scatter(part, parts, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if len({p.shape for p in parts}) == 1:
            return plain_scatter(part, parts, op, group, async_op)
        for destination, p in enumerate(parts):
            total = p.clone()
            dist.all_reduce(total, op, group)
            if destination == dist.get_rank(group):
                part.copy_(total)

    _replace(dist, all_gather=all_gather, reduce_scatter=reduce_scatter)


def _leave_gloo_out_where_a_rank_is_alone() -> None:
    """The gradients and weights of a model on one rank: gloo would copy each of them there and back, twice a step."""

    def alone(plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def collective(*tensors, group=None, async_op=False, **kwargs):
            if async_op or len(tensors) != 2 or dist.get_world_size(group) > 1:
                return plain(*tensors, group=group, async_op=async_op, **kwargs)
            output, input = tensors
            if output.data_ptr() != input.data_ptr():
                output.view(-1).copy_(input.view(-1))

        return collective

    _replace(
        dist,
        reduce_scatter_tensor=alone(dist.reduce_scatter_tensor),
        all_gather_into_tensor=alone(dist.all_gather_into_tensor),
    )


def _gather_bytes(output: torch.Tensor, input: torch.Tensor, **kwargs: Any) -> Any:
    """An interleaved pipeline gathers a chunk's bfloat16 weights and fp32 routers in one call, of which gloo makes one
    dtype; both get the wrong numbers, without a word."""
    return dist.all_gather_into_tensor(output.view(torch.uint8), input.view(torch.uint8), **kwargs)


def mend_megatron(on_cpu: bool) -> None:
    """Patch the imported Megatron-Core; `on_cpu` adds what only a machine without CUDA needs."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16.1 without Transformer Engine: NameError in every router forward (fixed in 0.19.2)
        moe_utils.te_general_gemm = None
    _load_objects_without_running_them()
    _describe_tensors_without_strides()
    take_descriptions_with_strides()
    _clip_gradients_in_place()
    if on_cpu:
        # bound at import from torch.cuda, which has no generator here
        _replace(
            mcore_random,
            _get_cuda_rng_state=lambda *a, **k: torch.get_rng_state(),
            _set_cuda_rng_state=lambda state, *a, **k: torch.set_rng_state(state),
        )
        # bound at import too, which may have been before `stand_in_for_cuda`
        _replace(
            param_and_grad_buffer,
            dist_all_gather_func=_gather_bytes,
            dist_reduce_scatter_func=dist.reduce_scatter_tensor,
        )


def _clip_gradients_in_place() -> None:
    """Without Transformer Engine and Apex Megatron scales each gradient into new memory, and copies it back.

    The products are the same; new memory for every gradient costs a CPU more time than they do.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    def scale_in_place(chunk_size, noop_flag, tensor_lists, scale):
        for source, destination in zip(*tensor_lists, strict=True):
            torch.mul(source, scale, out=destination)

    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        _replace(clip_grads, multi_tensor_scale_impl=scale_in_place)


def _load_objects_without_running_them() -> None:
    """torch's planner (2.13) unpickles the objects of a checkpoint with weights_only=False: they may run code.

    Each is first loaded with weights_only=True, which knows tensors, plain types and what Megatron-Core has registered.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    load_bytes = DefaultLoadPlanner.load_bytes
    if getattr(load_bytes, "checks_first", False):
        return  # installed already

    def load_checked_bytes(self, read_item, value):
        torch.load(value, map_location="cpu", weights_only=True)
        value.seek(0)
        return load_bytes(self, read_item, value)

    _replace(load_checked_bytes, checks_first=True)
    _replace(DefaultLoadPlanner, load_bytes=load_checked_bytes)


def _describe_tensors_without_strides() -> None:
    """torch 2.15 knows a stored tensor's strides, which Megatron-Core (to 0.19.2) hands to torch.empty: a TypeError."""
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from torch.distributed.checkpoint import FileSystemReader

    load_tensors_metadata = TorchDistLoadShardedStrategy.load_tensors_metadata
    if getattr(load_tensors_metadata, "without_strides", False):
        return  # installed already

    def load_without_strides(self, checkpoint_dir, metadata=None):
        metadata = metadata or FileSystemReader(checkpoint_dir).read_metadata()
        for described in metadata.state_dict_metadata.values():
            if hasattr(described, "properties"):  # a tensor, and no object
                vars(described.properties).pop("strides", None)
        return load_tensors_metadata(self, checkpoint_dir, metadata)

    _replace(load_without_strides, without_strides=True)
    _replace(TorchDistLoadShardedStrategy, load_tensors_metadata=load_without_strides)


def take_descriptions_with_strides() -> None:
    """torch 2.15 writes a stored tensor's strides, its last word of it, and no torch before reads such a checkpoint."""
    from torch.distributed.checkpoint.metadata import TensorProperties

    setstate = TensorProperties.__setstate__
    if "strides" in TensorProperties.__dataclass_fields__ or getattr(setstate, "takes_strides", False):
        return  # it knows them, or is mended already

    def setstate_without_strides(self, state):
        setstate(self, state[:5])

    _replace(setstate_without_strides, takes_strides=True)
    _replace(TensorProperties, __setstate__=setstate_without_strides)
