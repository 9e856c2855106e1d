"""One process as any rank of a run of any size: torch's `fake` process group answers for all the others.

Its collectives return at once. What comes back has the right shapes, and values that mean nothing.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from megatron_lpr.platform.device import prepare
from megatron_lpr.platform.distributed import leave


@contextlib.contextmanager
def alone_as(rank: int, world_size: int) -> Iterator[None]:
    """Inside it this process is the rank of that number; Megatron-Core can be imported.

    For processes that do nothing else: what is exchanged in torch and in Megatron stays so.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    _need_nobody_else()
    try:
        yield
    finally:
        leave()


@functools.cache
def _need_nobody_else() -> None:
    prepare()
    _make_every_group_fake()
    _answer_objects_with_the_own()
    _leave_generators_alone()


def _make_every_group_fake() -> None:
    """Megatron (0.16.1 to 0.19.2) asks for some groups with gloo by name, whose other ranks would never come."""
    new_group = dist.new_group

    def new_fake_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)

    dist.new_group = new_fake_group


def _answer_objects_with_the_own() -> None:
    """Gathered objects travel as bytes, and bytes that nobody has sent are no objects (torch 2.13).

    Megatron's optimizer gathers the names of its parameter groups, which are the same on all ranks.
    """

    def all_gather_object(gathered: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
        gathered[:] = [own] * len(gathered)

    setattr(dist, "all_gather_object", all_gather_object)  # noqa: B010 - of fewer forms than torch's


def _leave_generators_alone() -> None:
    """Megatron (0.16.1 to 0.19.2) compares the values of generator states, and fake tensors have no values."""
    from megatron.core.tensor_parallel import random as mcore_random

    def fork(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    mcore_random.CudaRNGStatesTracker.fork = fork
