"""The rank that decides about a layout is the worst of all its stages."""

import pytest

from megatron_lpr.families import read_architecture
from megatron_lpr.planning.hardware import GPUS
from megatron_lpr.planning.layout import Layouts
from megatron_lpr.planning.operations import operations
from megatron_lpr.planning.planned import PlannedRank
from megatron_lpr.planning.schedule import micro_batches
from megatron_lpr.planning.step_time import step_time
from megatron_lpr.recipe.reading import load_recipe

RANKS = 8  # of a stage


@pytest.mark.parametrize(
    "changes, fullest, slowest",
    [
        (["train.global_batch_size=64"], 0, 3),  # most micro-batches on their way; the output layer
        (["parallel.first_stage_layers=2", "parallel.last_stage_layers=2"], 1, 1),
        (["parallel.first_stage_layers=10", "train.global_batch_size=8"], 0, 0),
        (["train.recompute=full", "train.global_batch_size=8"], 3, 3),  # the logits
    ],
)
def test_the_fullest_and_the_slowest_stage(changes, fullest, slowest, root):
    base = ["model.base=examples/plan/qwen3-8b", "parallel.pipeline=4", "train.micro_batch_size=1"]
    recipe = load_recipe("examples/recipes/stage1.yaml", [*base, *changes])
    arch, gpu, train = read_architecture(recipe.model.base), GPUS["h100"], recipe.train
    ranks = [PlannedRank(recipe, arch, 4 * RANKS, stage * RANKS) for stage in range(4)]
    held = [rank.memory(train).total for rank in ranks]
    seconds = [
        step_time(
            rank.place,
            gpu,
            recipe.model.dtype,
            operations(recipe, arch, rank.layers(train), train.recompute),
            rank.moves(train),
            micro_batches(train, rank.place),
        ).total
        for rank in ranks
    ]
    layout = Layouts(recipe, arch, 4 * RANKS, gpu).layout(train)
    assert (layout.rank.place.stage, layout.slowest.place.stage) == (fullest, slowest)
    assert (layout.memory.total, layout.time.total) == (max(held), max(seconds))
