"""A layout of a run, reckoned: what its fullest rank holds, what a step takes at least."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from megatron_lpr.families import Architecture
from megatron_lpr.planning.amounts import RankMemory
from megatron_lpr.planning.hardware import GPU
from megatron_lpr.planning.moves import Move
from megatron_lpr.planning.operations import Operations, operations
from megatron_lpr.planning.planned import PlannedRank
from megatron_lpr.planning.schedule import micro_batches
from megatron_lpr.planning.step_time import StepTime, step_time
from megatron_lpr.recipe.settings import ParallelConfig, Recipe, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes with a batch and a mode of recomputation.

    rank: the fullest. time: of the slowest stage.
    """

    sizes: ParallelConfig
    train: TrainConfig
    rank: PlannedRank
    memory: RankMemory
    slowest: PlannedRank
    time: StepTime

    @property
    def micro_batches(self) -> int:
        return micro_batches(self.train, self.rank.place)

    def recipe(self) -> Recipe:
        return dataclasses.replace(self.rank.recipe, train=self.train)

    @cached_property
    def moves(self) -> list[Move]:
        """Of the slowest rank."""
        return self.slowest.moves(self.train)


class Layouts:
    """All batches and modes of recomputation of one set of parallel sizes."""

    def __init__(self, recipe: Recipe, arch: Architecture, world_size: int, gpu: GPU) -> None:
        self.recipe, self.arch, self.gpu = recipe, arch, gpu
        of_stage = world_size // recipe.parallel.pipeline
        # the first stage has most micro-batches on their way, the last one the logits, and others may have more layers
        stages = sorted({0, min(1, recipe.parallel.pipeline - 1), recipe.parallel.pipeline - 1})
        self.ranks = [PlannedRank(recipe, arch, world_size, stage * of_stage) for stage in stages]
        self._work: dict[tuple[int, str], Operations] = {}

    @cached_property
    def least(self) -> int:
        """Bytes of the fullest rank without any batch."""
        return max(rank.states.total for rank in self.ranks)

    def memory(self, train: TrainConfig) -> tuple[RankMemory, PlannedRank]:
        """Of the fullest rank."""
        return max(((rank.memory(train), rank) for rank in self.ranks), key=lambda found: found[0].total)

    def layout(self, train: TrainConfig) -> Layout:
        memory, fullest = self.memory(train)
        times = [(self._time(number, train), rank) for number, rank in enumerate(self.ranks)]
        time, slowest = max(times, key=lambda found: found[0].total)
        return Layout(sizes=self.recipe.parallel, train=train, rank=fullest, memory=memory, slowest=slowest, time=time)

    def _time(self, number: int, train: TrainConfig) -> StepTime:
        rank, key = self.ranks[number], (number, train.recompute)
        if key not in self._work:
            self._work[key] = operations(self.recipe, self.arch, rank.layers(train), train.recompute)
        count = micro_batches(train, rank.place)
        return step_time(rank.place, self.gpu, self.recipe.model.dtype, self._work[key], rank.moves(train), count)
