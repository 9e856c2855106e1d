"""Where a rank of a planned run stands, by Megatron's order of ranks: tensor, context, expert, data, pipeline."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_lpr.families import Architecture
from megatron_lpr.recipe.layout import layers_of_chunks
from megatron_lpr.recipe.settings import ParallelConfig

Group = Literal["tensor", "context", "data", "pipeline", "expert", "expert_tensor", "expert_data", "frozen", "world"]


@dataclass(frozen=True)
class Place:
    """A rank of a run of `world_size`; the last dimension of the order is the outermost.

    spread: frozen weights are sharded (`parallel.frozen`).
    """

    sizes: ParallelConfig
    world_size: int
    rank: int
    spread: bool = False

    @cached_property
    def of_stage(self) -> int:
        """Ranks of a pipeline stage."""
        return self.world_size // self.sizes.pipeline

    @cached_property
    def data(self) -> int:
        return self.of_stage // (self.sizes.tensor * self.sizes.context)

    @cached_property
    def stage(self) -> int:
        return self.rank // self.of_stage

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.sizes.pipeline - 1

    def size(self, group: Group) -> int:
        """Ranks of this rank's group."""
        sizes = self.sizes
        return {
            "tensor": sizes.tensor,
            "context": sizes.context,
            "data": sizes.context * self.data,
            "pipeline": sizes.pipeline,
            "expert": sizes.expert,
            "expert_tensor": sizes.expert_tensor,
            "expert_data": self.of_stage // (sizes.expert_tensor * sizes.expert),
            "frozen": self.of_stage,
            "world": self.world_size,
        }[group]

    def stride(self, group: Group) -> int:
        """From one rank of the group to the next."""
        sizes = self.sizes
        return {
            "tensor": 1,
            "context": sizes.tensor,
            "data": sizes.tensor,
            "pipeline": self.of_stage,
            "expert": sizes.expert_tensor,
            "expert_tensor": 1,
            "expert_data": sizes.expert_tensor * sizes.expert,
            "frozen": 1,
            "world": 1,
        }[group]

    def index(self, group: Group) -> int:
        """This rank's place in its group."""
        return self.rank // self.stride(group) % self.size(group)

    def chunks(self, arch: Architecture) -> list[range]:
        """The layers of each of this rank's model chunks."""
        return layers_of_chunks(self.sizes, arch.num_layers)[self.stage :: self.sizes.pipeline]
