"""Counts what the collectives of a step carry, at torch's dispatcher: on real tensors and on fake ones alike."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lpr.model.rank.place import Group
from megatron_lpr.planning.amounts import Amount, Collective
from megatron_lpr.planning.gathered_weights import GatheredWeights

# operator of torch.ops.c10d: its name here, and which argument the rank's input is
_KINDS: Mapping[str, tuple[Collective, int]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
}
_NO_DATA = {"barrier", "monitored_barrier_", "recv_", "recv_any_source_"}


class CountedCollectives(TorchDispatchMode):
    """Inside it every collective of this rank is counted; one among a single rank carries nothing anywhere.

    Attributes:
        traffic: what has been counted so far; several tensors that go as one collective are one call.
    """

    def __init__(self, gathered: GatheredWeights) -> None:
        super().__init__()
        self._gathered = gathered
        self.traffic: dict[tuple[Collective, Group], Amount] = defaultdict(Amount)
        self._names = _group_names()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple) -> None:
        if operator in _NO_DATA:
            return
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
        if group.size() == 1:
            return
        kind, place = _KINDS[operator]
        tensors = [x for x in pytree.tree_leaves(args[place]) if isinstance(x, torch.Tensor)]
        size = sum(x.numel() * x.element_size() for x in tensors)
        self.traffic[kind, self._name(kind, group)] += Amount(1, size)

    def _name(self, kind: Collective, group: dist.ProcessGroup) -> Group:
        if self._gathered.is_sending:
            return "frozen"
        # of two stages Megatron sends one way through the world's group, so that both ways overlap
        if kind == "send":
            return "pipeline"
        return self._names.get(group.group_name) or self._names[_ranks_of(group.group_name)]


def _ranks_of(name: Any) -> str:
    return str(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name)))


def _group_names() -> dict[str, Group]:
    """The kind of each of Megatron's groups, by its name in torch, and by its ranks: 0.19.2 has several of the same."""
    tensor, expert = (
        take() > 1
        for take in (
            parallel_state.get_tensor_model_parallel_world_size,
            parallel_state.get_expert_model_parallel_world_size,
        )
    )
    kinds: list[tuple[Group, Callable[[], Any]]] = [
        ("world", lambda: dist.group.WORLD),
        ("world", parallel_state.get_model_parallel_group),
        ("world", parallel_state.get_expert_tensor_model_pipeline_parallel_group),
        ("world", parallel_state.get_intra_distributed_optimizer_instance_group),
        ("tensor", parallel_state.get_tensor_model_parallel_group),
        ("context", parallel_state.get_context_parallel_group),
        ("tensor" if tensor else "context", parallel_state.get_tensor_and_context_parallel_group),
        ("data", parallel_state.get_data_parallel_group),
        ("data", lambda: parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ("pipeline", parallel_state.get_pipeline_model_parallel_group),
        ("pipeline", lambda: parallel_state.get_embedding_group(check_initialized=False)),
        ("expert", parallel_state.get_expert_model_parallel_group),
        ("expert" if expert else "expert_tensor", parallel_state.get_expert_tensor_and_model_parallel_group),
        ("expert_tensor", parallel_state.get_expert_tensor_parallel_group),
        ("expert_data", parallel_state.get_expert_data_parallel_group),
    ]
    taken = [(kind, take()) for kind, take in kinds]
    groups = [(kind, group.group_name) for kind, group in taken if isinstance(group, dist.ProcessGroup)]
    by_ranks = {_ranks_of(name): kind for kind, name in reversed(groups)}
    return by_ranks | {name: kind for kind, name in groups}
