"""Who sits where, what goes over which link, who holds how many micro-batches."""

import pytest

from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning.hardware import GPU, GPUS
from megatron_lpr.planning.links import OnLinks, on_links
from megatron_lpr.planning.moves import Move
from megatron_lpr.planning.operations import Operations
from megatron_lpr.planning.schedule import bubble, on_their_way
from megatron_lpr.planning.step_time import step_time
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
        (Move("all_to_all", "data", 800), 300, 400),
    ],
)
def test_bytes_on_links(move, inside, between):
    assert on_links(move, Place(SIZES, 32, 0), GPUS["h100"]) == OnLinks(inside, between)


@pytest.mark.parametrize("ranks, link", [(4, "inside"), (8, "between")])
def test_the_next_stage_is_elsewhere_where_a_stage_fills_a_node(ranks, link):
    place = Place(ParallelConfig(pipeline=2, tensor=ranks), 2 * ranks, 0)
    assert on_links(Move("send", "pipeline", 100), place, GPUS["h100"]) == OnLinks(**{link: 100})


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


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("rows, gathering", [(10**9, 3), (1.5 * 10**9, 4.5)])
def test_bound_of_a_step(overlapped, rows, gathering):
    """Two stages of 8 GPUs, four in a node; in a second one sends 2 GB there, and meanwhile 1 GB elsewhere."""
    gpu = GPU(name="", memory=0, flops={"bfloat16": 1e12}, inside=2e9, between=1e9, per_node=4)
    place = Place(ParallelConfig(pipeline=2, tensor=2, overlap_grad_reduce=overlapped), 16, 0)
    moves = [
        Move("send", "pipeline", 10**9, 2),  # 2 s
        Move("all_reduce", "tensor", 2 * 10**9),  # 1 s inside, meanwhile
        Move("all_gather", "data", int(rows) * 3, purpose="frozen"),  # of four ranks two are in a node
        Move("all_reduce", "data", 4 * 10**9),  # 4 GB inside and 2 GB elsewhere
    ]
    found = step_time(place, gpu, "bfloat16", Operations(products=12 * 10**12), moves, micro_batches=4)
    busy = max(1.5 + 2, gathering)
    assert (found.compute, found.waiting, found.gathering, found.gradients) == (1.5, 2, gathering, 2)
    assert found.bubble == busy / 4
    assert found.total == busy + busy / 4 + 2 - (busy / 4 if overlapped else 0)
