"""What TE asks of torch.cuda, answered as an H100 would, and only to TE.

`torch.cuda.is_available()` and `tensor.is_cuda` are true where the asking code is TE's, and what they were for all
others: a program that chooses its device by them goes on choosing the CPU.
"""

import contextlib
import sys
import types
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

PRETENDS_FOR = "transformer_engine."
H100 = types.SimpleNamespace(
    name="emulated H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
)


class CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"` (or a CUDA index) in factory calls means the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        device = (kwargs or {}).get("device")
        if device is not None and (isinstance(device, int) or torch.device(device).type == "cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if (kwargs or {}).get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))


class _Queue:
    """A stream or an event: everything is finished when the call returns."""

    def __init__(self, *args, **kwargs) -> None: ...

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def install() -> None:
    """Answer for this process. Names that a program has replaced by its own stand-ins already are left alone."""
    cuda = torch.cuda
    really_available = cuda.is_available
    cuda.is_available = lambda: True if _asked_by_te(2) else really_available()
    is_cuda = torch._C.TensorBase.is_cuda
    torch.Tensor.is_cuda = property(lambda self: True if _asked_by_te(2) else is_cuda.__get__(self))
    really_properties, really_capability = cuda.get_device_properties, cuda.get_device_capability
    cuda.get_device_properties = lambda *args: H100 if _asked_by_te(2) else really_properties(*args)
    cuda.get_device_capability = lambda *args: (H100.major, H100.minor) if _asked_by_te(2) else really_capability(*args)
    cuda.is_current_stream_capturing = lambda: False
    cuda.empty_cache = lambda: None
    cpu = torch.device("cpu")
    for name, stand_in in {
        "current_device": lambda: cpu,
        "set_device": lambda *args: None,
        "synchronize": lambda *args: None,
        "current_stream": lambda *args: _Queue(),
        "default_stream": lambda *args: _Queue(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
    }.items():
        if getattr(cuda, name).__module__.startswith("torch."):
            setattr(cuda, name, stand_in)
    for name in ("Stream", "Event"):
        if getattr(cuda, name).__module__.startswith("torch."):
            setattr(cuda, name, _Queue)
    cuda.nvtx.range_push = lambda *args: None
    cuda.nvtx.range_pop = lambda *args: None
    CudaMeansCpu().__enter__()
    # torch leaves function modes off while it computes gradients; TE's backward passes ask for "cuda" too
    plain = torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):
        with CudaMeansCpu():
            return plain(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward


def _asked_by_te(depth: int) -> bool:
    return sys._getframe(depth).f_globals.get("__name__", "").startswith(PRETENDS_FOR)
