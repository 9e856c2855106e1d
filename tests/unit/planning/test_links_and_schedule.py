"""Who sits where, what goes over which link, who holds how many micro-batches."""

import pytest

from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning.hardware import GPUS
from megatron_lpr.planning.links import OnLinks, on_links
from megatron_lpr.planning.moves import Move
from megatron_lpr.planning.schedule import bubble, on_their_way
from megatron_lpr.recipe.settings import ParallelConfig

SIZES = ParallelConfig(tensor=2, context=2, pipeline=2, expert=4, expert_tensor=1)


def members(group, rank=0, world_size=32):
    """The ranks of a rank's group, by its size and stride."""
    place = Place(SIZES, world_size, rank)
    first = rank - place.index(group) * place.stride(group)
    return [first + n * place.stride(group) for n in range(place.size(group))]


def test_groups_follow_megatrons_order_of_ranks():
    assert members("tensor") == [0, 1]
    assert members("context") == [0, 2]
    assert members("data", 1) == [1, 3, 5, 7, 9, 11, 13, 15], "context-parallel ranks hold the same weights"
    assert members("expert", 5) == [4, 5, 6, 7]
    assert members("expert_data") == [0, 4, 8, 12]
    assert members("pipeline", 17) == [1, 17]
    assert members("frozen", 17) == list(range(16, 32))


@pytest.mark.parametrize(
    "move, inside, between",
    [
        (Move("all_gather", "tensor", 100), 100, 0),
        (Move("all_reduce", "tensor", 100), 100, 0),
        (Move("all_to_all", "expert", 100), 75, 0),
        # of eight ranks four are in a node: each sends three quarters of the whole inside, an eighth to the other
        (Move("all_gather", "data", 100), 600, 100),
        (Move("reduce_scatter", "data", 800), 600, 100),
        (Move("all_reduce", "data", 800), 1200, 200),
        (Move("send", "pipeline", 100, 3), 0, 300),
    ],
)
def test_bytes_on_links(move, inside, between):
    assert on_links(move, Place(SIZES, 32, 0), GPUS["h100"]) == OnLinks(inside, between)


def stage(number, pipeline, virtual=1):
    return Place(ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual), pipeline, number)


def test_micro_batches_on_their_way():
    assert [on_their_way(stage(n, 4), 8) for n in range(4)] == [[4], [3], [2], [1]]
    assert on_their_way(stage(0, 4), 2) == [2], "there are no more"
    # 2 (p - 1) + (v - 1) p + 1 chunks of a micro-batch, as Narayanan et al. have it
    assert on_their_way(stage(0, 4, 2), 8) == [7, 4]
    assert on_their_way(stage(3, 4, 2), 8) == [4, 1]


def test_bubble():
    assert bubble(stage(0, 4), 8) == 3 / 8
    assert bubble(stage(0, 4, 2), 8) == 3 / 16
