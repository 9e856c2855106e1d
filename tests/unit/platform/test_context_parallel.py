"""Which positions a context-parallel rank has."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_lpr.platform.context_parallel import in_order, rank_chunks, rank_positions

SIZES = [1, 2, 3, 4]


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_has_the_positions_that_megatron_gives_it(megatron, size):
    """Rotary embeddings are Megatron's: a token elsewhere would be turned by the wrong angle."""
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    length = 12 * size
    positions_BS = np.arange(2 * length).reshape(2, length)
    for rank in range(size):
        group = SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
        expected = get_pos_emb_on_this_cp_rank(torch.from_numpy(positions_BS), 1, group)
        np.testing.assert_array_equal(rank_positions(positions_BS, rank, size), expected)


def test_two_ranks():
    tags = np.array([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert rank_positions(tags, 0, 2).tolist() == [[0, 1, 6, 7]]
    assert rank_positions(tags, 1, 2).tolist() == [[2, 3, 4, 5]]


@pytest.mark.parametrize("size", SIZES)
def test_the_parts_of_all_ranks_in_order_are_the_sequence(size):
    sequence_S1 = torch.arange(12 * size)[:, None]
    parts = [torch.from_numpy(rank_positions(sequence_S1.T.numpy(), rank, size).T) for rank in range(size)]
    assert torch.equal(in_order(torch.cat(parts), size), sequence_S1)


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_sees_as_many_keys(size):
    """Causal work of a chunk grows with the keys before it."""
    assert {sum(rank_chunks(rank, size)) for rank in range(size)} == {2 * size - 1}
