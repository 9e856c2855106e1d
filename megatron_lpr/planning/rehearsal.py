"""Any rank of a run, built and run for one step on this machine, in a process of its own.

torch's `fake` process group answers for all other ranks and fake tensors stand for all memory, so that the real
builder, the real wrapping and optimizer, and the real pipeline schedule say what a rank holds and sends.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning.amounts import Amount, RankMemory, Traffic
from megatron_lpr.planning.schedule import micro_batches
from megatron_lpr.platform.transformer_engine import hide_kernels
from megatron_lpr.recipe.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a rank would hold and send, and what it took to find out.

    Attributes:
        seconds: that this machine has computed, in one thread.
        resident: most bytes of this machine's memory at once, torch and Megatron included.
    """

    memory: RankMemory
    traffic: Traffic
    seconds: float
    resident: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which rank of which run is rehearsed; the recipe has been checked, and says `model.spec: local`.

    device: of the run. On a CPU some modules save more.
    """

    recipe: Recipe
    arch: Architecture
    world_size: int
    rank: int = 0
    device: Literal["cuda", "cpu"] = "cuda"


def rehearse(parts: Sequence[Part]) -> list[Rehearsal]:
    """Rehearse one step of each part, in one process of their own, of which nothing stays in this one.

    Raises:
        UserError: no process can be started.
    """
    try:
        pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    except OSError as error:
        raise UserError(
            f"cannot start a process to rehearse in: {error.strerror or error}; its semaphores want some KB of a "
            "/dev/shm that can be written to: make room there, or mount one"
        ) from error
    with pool as process:
        return list(process.map(_rehearse_here, parts))


def _rehearse_here(part: Part) -> Rehearsal:
    start = time.process_time()
    _leave_the_gpu_alone()
    memory, traffic = _step(part)
    return Rehearsal(
        memory=memory,
        traffic=traffic,
        seconds=time.process_time() - start,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _step(part: Part) -> tuple[RankMemory, Traffic]:
    """Of all micro-batches; from two steps with fewer where they are many.

    A pipeline is full with as many as it has stages, interleaved with twice as many; each further one sends the same.
    """
    train, sizes = part.recipe.train, part.recipe.parallel
    assert train is not None
    place = Place(sizes, part.world_size, part.rank)
    unit = sizes.pipeline if sizes.virtual_pipeline > 1 else 1  # Megatron interleaves whole rounds only
    count, fewer, more = micro_batches(train, place), unit, max(2 * unit, sizes.pipeline)
    if count <= fewer + more:
        return _step_of(part, count * train.micro_batch_size * place.data)
    _, less = _step_of(part, fewer * train.micro_batch_size * place.data)
    memory, traffic = _step_of(part, more * train.micro_batch_size * place.data)
    return memory, {key: _further(less[key], traffic[key], (count - more) / (more - fewer)) for key in traffic}


def _further(less: Amount, more: Amount, by: float) -> Amount:
    return Amount(*(round(y + (y - x) * by) for x, y in zip(less, more, strict=True)))


def _step_of(part: Part, samples: int) -> tuple[RankMemory, Traffic]:
    """Of a step with a global batch of so many samples."""
    from megatron_lpr.platform.fake_ranks import alone_as

    assert part.recipe.train is not None
    recipe = dataclasses.replace(part.recipe, train=dataclasses.replace(part.recipe.train, global_batch_size=samples))
    with alone_as(part.rank, part.world_size):
        # they import Megatron
        from megatron_lpr.planning.even_routing import even_routing
        from megatron_lpr.planning.like_cuda import like_cuda
        from megatron_lpr.planning.one_step import count_step
        from megatron_lpr.planning.shapes_only import shapes_only

        kernels = like_cuda() if part.device == "cuda" else contextlib.nullcontext()
        with even_routing(), shapes_only(), kernels:
            return count_step(recipe, part.arch)


@functools.cache
def _leave_the_gpu_alone() -> None:
    """Neither a GPU nor Transformer Engine, whose kernels know no tensors without memory, is seen by this process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    hide_kernels()
