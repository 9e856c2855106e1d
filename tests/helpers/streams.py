"""Stand-ins for CUDA streams that find, on a CPU, what would be a race on a GPU.

Each operator counts as a kernel on the current stream. A stream knows how far the others were when it waited for them.
It may read only what it has computed itself or knows to be computed; and where it takes memory, whoever has read what
lay there before must be known to be done, for the allocator gives memory out again in the order of the stream that it
was taken on.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    """Knows how many kernels of each stream, itself included, are done when its next one starts."""

    def __init__(self, name: str = "side") -> None:
        self.name = name
        self.knows: dict[Stream, int] = {}

    def kernels(self) -> int:
        return self.knows.get(self, 0)

    def wait_stream(self, other: "Stream") -> None:
        for stream, kernels in other.knows.items():
            self.knows[stream] = max(self.knows.get(stream, 0), kernels)

    def is_behind(self, others: dict["Stream", int]) -> bool:
        return any(self.knows.get(stream, 0) < kernels for stream, kernels in others.items())


class Streams(TorchDispatchMode):
    """`races` names each operator that would read too early or overwrite what is still read."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream("main")
        self.races: list[str] = []
        self.calls: list[tuple[str, Any]] = []  # (stream, operator), and what a test adds
        self._written: dict[int, tuple[Stream, dict[Stream, int]]] = {}  # by storage: where it is from, and its writers
        self._read: dict[int, dict[Stream, int]] = {}
        self._free: dict[Stream, list[dict[Stream, int]]] = {}

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        here = self.current
        here.knows[here] = here.kernels() + 1
        self.calls.append((here.name, func))
        inputs = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for storage in inputs:
            if storage._cdata in self._written and here.is_behind(self._written[storage._cdata][1]):
                self.races.append(f"{func} on {here.name} reads too early")
            self._read.setdefault(storage._cdata, {})[here] = here.kernels()
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self._written and storage._cdata not in {one._cdata for one in inputs}:
                if any(here.is_behind(readers) for readers in self._free.pop(here, [])):
                    self.races.append(f"{func} on {here.name} takes memory that another stream still reads")
                weakref.finalize(storage, self._let_go, storage._cdata)
                self._written[storage._cdata] = here, {}
            if storage._cdata in self._written and not func.is_view:
                self._written[storage._cdata][1][here] = here.kernels()
        return result

    def _let_go(self, storage: int) -> None:
        stream, _ = self._written.pop(storage)
        self._free.setdefault(stream, []).append(self._read.pop(storage, {}))


@contextlib.contextmanager
def streams(monkeypatch) -> Iterator[Streams]:
    """Inside it `torch.cuda` has these streams, and what runs is looked at."""
    from megatron_lpr.platform import side_stream

    found = Streams()
    with monkeypatch.context() as patch, found:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda: found.current)
        patch.setattr(torch.cuda, "stream", found.stream)
        side_stream._side_stream.cache_clear()
        yield found
    side_stream._side_stream.cache_clear()
