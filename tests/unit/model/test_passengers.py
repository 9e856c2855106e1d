"""Language tags and document numbers on their way through Megatron's model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_lpr.model.passengers import for_attention, passengers, tags_of_layer

TAGS_BS = torch.tensor([[1, 2, 0, 0], [-1, -1, 3, 3]])


def group(rank: int, size: int):
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


@pytest.mark.parametrize("rank, size", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("cut_before", [False, True])
def test_a_layer_gets_the_tags_of_its_own_positions(rank, size, cut_before):
    """With sequence parallelism, whether the first pipeline stage has cut them or a later one gets them whole."""
    own_BS = TAGS_BS.chunk(size, dim=1)[rank]
    arguments = passengers(own_BS if cut_before else TAGS_BS) | {"packed_seq_params": None}
    assert tags_of_layer(arguments, own_BS.shape[1], group(rank, size)).tolist() == own_BS.t().tolist()


def test_no_tags():
    assert tags_of_layer(passengers(None), 4, group(0, 1)) is None
    assert tags_of_layer({}, 4, group(0, 1)) is None


def test_tags_of_another_length_are_a_bug():
    with pytest.raises(AssertionError, match="other lengths"):
        tags_of_layer(passengers(TAGS_BS), 3, group(0, 1))


def test_transformer_engine_knows_documents_by_their_borders():
    numbers_BS = np.array([[0, 0, 1, 2], [0, 1, 1, -1]], np.int32)
    borders = for_attention(numbers_BS, te=True, context_parallel=1)
    assert borders.dtype == np.int32 and borders.tolist() == [0, 2, 3, 4, 5, 7, 8]
    assert for_attention(numbers_BS, te=False, context_parallel=1) is numbers_BS
    assert for_attention(numbers_BS, te=True, context_parallel=2) is numbers_BS
