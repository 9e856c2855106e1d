"""Frozen weights stay what they were."""

import socket

import torch
import torch.distributed as dist

from megatron_lpr.errors import AlreadyTold, UserError
from megatron_lpr.model.builder import named_weights
from megatron_lpr.model.checksum import tensor_checksums
from megatron_lpr.platform import device
from megatron_lpr.platform.shards import own_part
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer


class FrozenWeights(Hook):
    """A frozen weight that is not what it was when the trainer was built: nothing is saved with it, and the run ends.

    Every rank sums up its own, on its device; one number tells them whether any has found something.
    """

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self._frozen = {name: p for name, p in named_weights(chunks) if not p.requires_grad}
        self._before = self._checksums()

    def before_save(self, trainer: RunningTrainer) -> None:
        """Raises UserError, on all ranks, where a frozen weight of any of them has changed."""
        changed = (self._checksums() != self._before).nonzero().flatten().to(device())
        first_rank = torch.tensor([dist.get_rank() if len(changed) else dist.get_world_size()], device=device())
        dist.all_reduce(first_rank, dist.ReduceOp.MIN)
        rank = int(first_rank)
        if rank == dist.get_world_size():
            return
        if rank != dist.get_rank():
            raise AlreadyTold(f"a frozen weight has changed on rank {rank}")
        names = [list(self._frozen)[index] for index in changed.tolist()]
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise UserError(
            f"step {trainer.step}: the frozen weight {names[0]}{more} on rank {rank} ({socket.gethostname()}) has "
            "changed in memory, so nothing was saved: start the run again, and test the memory of that machine if this "
            "happens there once more"
        )

    def _checksums(self) -> torch.Tensor:
        return tensor_checksums(own_part(parameter) for parameter in self._frozen.values())
