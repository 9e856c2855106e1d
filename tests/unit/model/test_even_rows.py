"""Rows of zeros after the tokens of each expert."""

import pytest
import torch

from megatron_lpr.model.even_rows import EvenRows


@pytest.mark.parametrize("tokens", [(5, 0, 8), (16, 17, 1), (0, 0), (32,), (0, 3)])
def test_tokens_come_back_and_zeros_lie_between(tokens):
    rows = EvenRows(torch.tensor(tokens))
    assert rows.rows_N.tolist() == [-(-count // 16) * 16 for count in tokens]
    x = torch.randn(sum(tokens), 3, requires_grad=True)
    spread = rows.spread(x)
    for part, own, count in zip(spread.split(rows.rows_N.tolist()), x.split(tokens), tokens, strict=True):
        assert torch.equal(part[:count], own) and not part[count:].any()
    assert torch.equal(rows.gather(spread), x)


def test_gradients_go_the_other_way():
    rows = EvenRows(torch.tensor([5, 0, 8]))
    for function, length in ((rows.spread, 13), (rows.gather, 32)):
        x = torch.randn(length, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, x)


def test_no_value_of_a_token_reaches_the_zeros():
    rows = EvenRows(torch.tensor([1, 2]))
    assert torch.equal(rows.spread(torch.full((3,), torch.inf)).isinf().nonzero()[:, 0], torch.tensor([0, 16, 17]))
