"""Copies of a weight are the same on all ranks that have one."""

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_lpr.errors import UserError
from megatron_lpr.model.builder import named_weights
from megatron_lpr.model.checksum import tensor_checksums
from megatron_lpr.platform import device
from megatron_lpr.platform.shards import is_sharded
from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer
from megatron_lpr.training.optimizer import gather_parameters


class Replicas(Hook):
    """Compares the weights of data-parallel ranks, by a checksum of each, every `train.check_replicas_every` steps and
    before each checkpoint.

    A difference is a memory or a network at fault: the run ends, and nothing is saved of it.
    """

    def __init__(self) -> None:
        self._compared = 0  # the step after which they were the same

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        every = trainer.plan.train.check_replicas_every
        if every and trainer.step % every == 0:
            gather_parameters(trainer.chunks)
            self._compare(trainer)

    def before_save(self, trainer: RunningTrainer) -> None:
        if trainer.plan.train.check_replicas_every and self._compared != trainer.step:
            self._compare(trainer)

    def _compare(self, trainer: RunningTrainer) -> None:
        """Raises UserError, the same on all ranks, where a weight differs between ranks that have copies of it."""
        difference = find_difference(trainer.chunks)
        if difference is None:
            self._compared = trainer.step
            return
        trainer.finish_save()  # of an earlier step, when they were the same
        again = "from its first step" if trainer.saved_step is None else f"at step {trainer.saved_step}"
        raise UserError(
            f"step {trainer.step}: {difference}; nothing is saved of it: look at the memory of the machines, leave out "
            f"the one at fault, and start the run again, which then goes on {again}"
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A weight of which the ranks of a group do not have the same copy."""

    name: str
    odd: list[int]  # ranks that have another one than most; all where there is no such thing as most
    others: list[int]

    def __str__(self) -> str:
        odd = ", ".join(map(str, self.odd))
        if not self.others:
            return f"the weight {self.name} is not the same on ranks {odd}"
        ranks = "rank" if len(self.odd) == 1 else "ranks"
        return f"the weight {self.name} of {ranks} {odd} is not that of ranks {', '.join(map(str, self.others))}"


def find_difference(chunks: Sequence[torch.nn.Module]) -> str | None:
    """The first weight that differs between its copies, with the ranks and their machines; the same on all ranks.

    Each group gathers eight bytes for each weight; one number then tells all ranks whether there is anything to tell.
    """
    weights = [(name, p) for name, p in named_weights(chunks) if not is_sharded(p)]  # no copy of what is there once
    experts = [(name, p) for name, p in weights if not getattr(p, "allreduce", True)]
    dense = [(name, p) for name, p in weights if getattr(p, "allreduce", True)]
    groups = (
        (dense, parallel_state.get_data_parallel_group(with_context_parallel=True)),
        (experts, parallel_state.get_expert_data_parallel_group()),
    )
    differences = [_compare(those, group) for those, group in groups]  # both, for other ranks may find none in one
    found = next((difference for difference in differences if difference), None)
    flag = torch.tensor([found is not None], dtype=torch.int32, device=device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if not int(flag):
        return None
    told: list[tuple[Difference | None, str]] = [(None, "")] * dist.get_world_size()
    dist.all_gather_object(told, (found, socket.gethostname()))
    difference = next(difference for difference, _ in told if difference)
    hosts = list(dict.fromkeys(told[rank][1] for rank in difference.odd))
    return f"{difference} ({', '.join(hosts)})"


def _compare(weights: Sequence[tuple[str, torch.Tensor]], group: dist.ProcessGroup) -> Difference | None:
    size = dist.get_world_size(group)
    if size == 1 or not weights:
        return None
    own_W = tensor_checksums(weight for _, weight in weights).to(device())
    of_ranks = [torch.empty_like(own_W) for _ in range(size)]
    dist.all_gather(of_ranks, own_W, group=group)
    sums_RW = torch.stack(of_ranks).cpu()
    differing = (sums_RW != sums_RW[0]).any(0).nonzero().flatten().tolist()
    if not differing:
        return None
    return judge(weights[differing[0]][0], sums_RW[:, differing[0]].tolist(), dist.get_process_group_ranks(group))


def judge(name: str, sums: Sequence[int], ranks: Sequence[int]) -> Difference:
    """Which of the ranks have another copy than most."""
    (usual, count), *_ = Counter(sums).most_common()
    is_most = 2 * count > len(sums)
    odd = [rank for rank, of_rank in zip(ranks, sums, strict=True) if of_rank != usual or not is_most]
    return Difference(name=name, odd=odd, others=[rank for rank in ranks if rank not in odd])
