"""A parameter of which this rank holds some rows, the others being on other ranks: FSDP2 leaves it as a DTensor."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is spread over ranks by its rows."""
    return isinstance(tensor, DTensor)


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether it is sharded, and its rows lie here quantised: these tell FSDP2 themselves how to gather them."""
    return isinstance(tensor, DTensor) and hasattr(tensor._local_tensor, "fsdp_pre_all_gather")


def mark_group(parameter: Any, group: dist.ProcessGroup) -> None:
    """Remember which ranks a parameter is spread over.

    Its own mesh does not tell: DTensor takes the mesh of an earlier layout in this process for it, if that had the same
    ranks, and the groups of that are gone.
    """
    parameter.shard_group = group


@contextlib.contextmanager
def marks_kept(module: torch.nn.Module) -> Iterator[None]:
    """Inside it parameters may be exchanged for others of the same names, which get the attributes of those before.

    Megatron's marks of parallelism, and `mark_group`'s, are attributes. Sharding puts other parameters in place, and a
    conversion of sharded ones (torch 2.13) exchanges all that they are, even where it has nothing to convert.
    """
    marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
    yield
    for name, parameter in module.named_parameters():
        vars(parameter).update(marks[name])


def group_of(parameter: Any) -> dist.ProcessGroup:
    """The ranks that a sharded parameter is spread over."""
    return cast(dist.ProcessGroup, parameter.shard_group)


@torch.no_grad()
def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of it lies on this rank: its own rows, or the whole tensor; the same memory, not a copy.

    On the last ranks quantised rows may be followed by others, of zeros: all ranks have as many.
    """
    if is_quantised(tensor):
        return cast(DTensor, tensor)._local_tensor  # to_local() would leave out their scale
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: torch.Tensor) -> range:
    """Which of its rows lie on this rank: as many on each as on the first, and fewer or none on the last ones."""
    rows = tensor.shape[0]
    if not is_sharded(tensor):
        return range(rows)
    group = group_of(tensor)
    each = -(-rows // group.size())
    first = min(group.rank() * each, rows)
    return range(first, min(first + each, rows))
