"""Counts where the host would wait for a GPU, in code that runs on a CPU, and whose code it is.

A tensor is taken to be on the device, unless it is one that was copied to the host, or was computed from such a one.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

ATEN = torch.ops.aten
# the host must know what is in the tensor, to go on or to know the size of the result
WAITING = {
    ATEN._local_scalar_dense.default,  # item(), float(), bool(), if
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
    ATEN.unique_consecutive.default,
    ATEN.bincount.default,
    ATEN.equal.default,
    ATEN.repeat_interleave.Tensor,
}
PACKAGES = ("megatron_lpr", "megatron")
STAND_INS = "megatron_lpr.platform.shims"  # they are in every call on a CPU, and in none on a GPU


class HostWaits:
    """`of(package)`: how often the code of a package waits, by file, function and what it calls."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._host: WeakTensorKeyDictionary[torch.Tensor, bool] = WeakTensorKeyDictionary()

    def of(self, package: str) -> dict[str, int]:
        return {what: count for (whose, what), count in self.counts.items() if whose == package}

    def waits(self, call: str) -> None:
        self.counts[_whose(call)] += 1

    def is_on_host(self, values: Any) -> bool:
        """Of the arguments of a call: where its first tensor is."""
        first = next((value for value in tree_leaves(values) if isinstance(value, torch.Tensor)), None)
        return first is not None and first in self._host

    def put_on_host(self, values: Any) -> Any:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                self._host[value] = True
        return values


class _Calls(TorchFunctionMode):
    """What no operator tells of, as all is on one device here: copies to the host, and lists made of a tensor."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and not self.waits.is_on_host(args[0]):
            self.waits.waits(func.__name__)
        to_host = func is torch.Tensor.cpu or (func is torch.Tensor.to and args[1:2] == ("cpu",))
        if not to_host or self.waits.is_on_host(args[0]):
            return func(*args, **kwargs)
        if not kwargs.get("non_blocking"):
            self.waits.waits(func.__name__)
        return self.waits.put_on_host(args[0].clone())


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_on_host = self.waits.is_on_host((args, kwargs))
        if not is_on_host and (func in WAITING or _has_mask_as_index(func, args)):
            self.waits.waits(str(func))
        result = func(*args, **(kwargs or {}))
        return self.waits.put_on_host(result) if is_on_host else result


def _has_mask_as_index(func, args) -> bool:
    if func not in (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default):
        return False
    if func is not ATEN.index.Tensor and args[2].ndim == 0:
        return False  # one value for all: a masked fill
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _whose(call: str) -> tuple[str, str]:
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if (package := module.split(".")[0]) in PACKAGES and module != STAND_INS:
            return package, f"{module}.{frame.f_code.co_name}: {call}"
        frame = frame.f_back
    return "others", call


@contextlib.contextmanager
def host_waits(monkeypatch) -> Iterator[HostWaits]:
    """Counts inside it. A copy that has begun (platform.to_host) is waited for where nobody has waited since."""
    from megatron_lpr.platform import shims
    from megatron_lpr.platform.to_host import ToHost

    found = HostWaits()
    begin, read = ToHost.__init__, ToHost.read

    def begin_counted(copy, tensor):
        begin(copy, tensor)
        copy.waits_before = found.counts.total()

    def read_counted(copy):
        if found.counts.total() == copy.waits_before:
            found.waits("ToHost.read")
        return found.put_on_host(read(copy))

    with monkeypatch.context() as patch, _Calls(found), _Operators(found):
        patch.setattr(ToHost, "__init__", begin_counted)
        patch.setattr(ToHost, "read", read_counted)
        patch.setattr(shims._Event, "synchronize", lambda event: found.waits("Event.synchronize"))
        yield found
