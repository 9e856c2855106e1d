"""The ranks of this run: torchrun's or Slurm's environment, or a single process."""

import contextlib
import datetime
import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_lpr.errors import UserError
from megatron_lpr.platform.callers_torch import callers_torch_set_aside
from megatron_lpr.platform.device import backend, device, prepare
from megatron_lpr.platform.meeting import meeting_store

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands in the run."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        """torchrun's variables first, then Slurm's of a step started by srun, else one process.

        Raises:
            UserError: the variables contradict each other or are incomplete.
        """
        environment = os.environ
        if "RANK" in environment:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        elif "SLURM_PROCID" in environment and _number("SLURM_STEP_NUM_TASKS", "1") > 1:
            # the batch shell has SLURM_PROCID too, so that only a step of several tasks counts
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        else:
            return cls(rank=0, local_rank=0, world_size=1)
        missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise UserError(
                f"a distributed run needs the environment variables {', '.join(missing)}: "
                "start it with torchrun, or export them in the Slurm script"
            )
        rank, local_rank, world_size = map(_number, names)
        if rank >= world_size:
            raise UserError(f"{names[0]}: is {rank}, but {names[2]} is {world_size}; ranks are counted from 0")
        if not 0 < _number("MASTER_PORT") < 1 << 16:
            raise UserError(f"MASTER_PORT: '{environment['MASTER_PORT']}' is no port; choose one from 1 to 65535")
        return cls(rank=rank, local_rank=local_rank, world_size=world_size)


def _number(name: str, default: str = "") -> int:
    value = os.environ.get(name, default)
    if not value.isdecimal():
        raise UserError(
            f"the environment variable {name}: '{value}' is no number; start a distributed run with torchrun or srun, "
            "or unset it"
        )
    return int(value)


def single_process(what: str) -> None:
    """UserError under a launcher of several processes."""
    world_size = Ranks.from_environment().world_size
    if world_size > 1:
        raise UserError(f"{what} runs in one process, not in {world_size}; it reads checkpoints of any layout")


def no_rank_yet() -> None:
    """UserError where this process is a rank of a run already."""
    if dist.is_initialized():
        raise UserError(
            "this process is a rank of a run already, and does one thing at a time: leave the `with session` block "
            "first, or end a process group of your own with torch.distributed.destroy_process_group()"
        )


@contextlib.contextmanager
def megatron(timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Inside it this process is a rank of the run, and Megatron-Core can be imported.

    A rank that fails among several does not wait for the others on its way out: its exit ends the run.

    Raises:
        UserError: it is a rank of a run already, or Megatron-Core cannot be used here.
    """
    no_rank_yet()
    prepare()  # first: who leaves a group needs Megatron
    ranks = join(timeout_minutes)
    try:
        with callers_torch_set_aside(), torch.random.fork_rng(_generators()):
            yield ranks
    except BaseException:
        if ranks.world_size == 1:
            leave()
        raise
    leave()


def _generators() -> list[torch.device]:
    """Beside the CPU's; Megatron seeds all of them, and the caller's numbers would begin anew after each call."""
    return [device()] if device().type == "cuda" else []


_excepthook = sys.excepthook


def join(timeout_minutes: float = 30.0) -> Ranks:
    """Join the run's process group (a single process makes one of its own).

    Raises:
        UserError: this machine does not let it.
    """
    global _excepthook
    ranks, _excepthook = Ranks.from_environment(), sys.excepthook
    with gloo_told():
        dist.init_process_group(
            backend(),
            # alone: no port to find or to fight over
            store=dist.HashStore() if ranks.world_size == 1 else meeting_store(),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=device() if device().type == "cuda" else None,
        )
    return ranks


@contextlib.contextmanager
def gloo_told() -> Iterator[None]:
    """UserError for what gloo cannot have of this machine, where process groups are made inside."""
    try:
        yield
    except RuntimeError as error:
        # gloo's word for it, and C++'s where there can be no further thread
        if "enforce fail" not in str(error) and str(error) != os.strerror(errno.EAGAIN):
            raise
        missed = str(error).splitlines()[0].rpartition("] ")[2]
        raise UserError(
            f"gloo cannot be started here ({missed}): it needs a network, if only lo (ip link set lo up), "
            "GLOO_SOCKET_IFNAME unset or right, `ulimit -n` of 256 or more with few ranks, and some threads for each "
            "group (ulimit -u, the container's limit of processes)"
        ) from error


def group_store() -> dist.Store:
    """The store that this process's group was made at."""
    return distributed_c10d._get_default_store()


def from_first_rank(value: T) -> T:
    """Rank 0's value, on every rank; all ranks call it. What others have is forgotten."""
    if dist.get_world_size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0, device=device())
    return told[0]


_on_leave: list[Callable[[], None]] = []


def on_leave(function: Callable[[], None]) -> None:
    """Have `function` called when this process leaves the run, to drop what keeps process groups alive."""
    _on_leave.append(function)


def leave_layout() -> None:
    """Give up Megatron's groups and the models on them, so that the next layout can make its own in the same run."""
    from megatron.core import parallel_state

    dist.barrier()  # no rank may still be in a collective of a group that another one ends
    while _on_leave:
        _on_leave.pop()()
    parallel_state.destroy_model_parallel()
    gc.collect()  # models and optimizers are full of cycles
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)  # Megatron only forgets it; gloo's threads would add up


def leave() -> None:
    """Leave the process group, and Megatron's groups with it."""
    if dist.is_initialized():
        leave_layout()
        dist.destroy_process_group()
        sys.excepthook = _excepthook  # torch's writes [rank0] before each line of a traceback, once for each group made
