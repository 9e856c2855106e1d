"""What is counted of one rank, planned or rehearsed: memory by kind, and what its collectives carry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_lpr.model.rank.place import Group

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank at the fullest moment of a step.

    frozen: weights that never learn, this rank's shards where they are sharded.
    trained: weights that learn, as the model computes with them.
    casts: copies of weights in FP8, which its products read.
    gradients: DDP's buffers.
    optimizer: fp32 weights and moments.
    activations: what is saved for the backward passes of all micro-batches that are on their way.
    gathered: whole weights of the sharded layers that compute, or are about to, and what they are copied from.
    logits: what the loss saves, which the backward pass of one micro-batch needs.
    working: what comes and goes: a layer that is computed again, the logits before the loss. No saved tensors.
    """

    frozen: int = 0
    trained: int = 0
    casts: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    gathered: int = 0
    logits: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __add__(self, other: "RankMemory") -> "RankMemory":
        return RankMemory(**{kind: held + vars(other)[kind] for kind, held in vars(self).items()})


class Amount(NamedTuple):
    """Of one kind of collective in one group, by one rank in one optimizer step.

    bytes: what the collectives' inputs hold on this rank, counted at each call.
    """

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: object) -> "Amount":
        assert isinstance(other, Amount)
        return Amount(self.calls + other.calls, self.bytes + other.bytes)


Traffic = Mapping[tuple[Collective, Group], Amount]
