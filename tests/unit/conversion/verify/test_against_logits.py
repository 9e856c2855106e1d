"""Which differences between the logits of Megatron and of transformers are rounding."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.megatron

POSITIONS, VOCAB = 400, 8


@pytest.fixture(autouse=True)
def prepared(megatron_imported):
    """`against_logits` is imported after Megatron was prepared."""


def check(change, *, num_experts=3):
    """The check of a stock model that computes `change` beside the Megatron model's logits."""
    logits_TV = torch.randn(POSITIONS, VOCAB, generator=torch.Generator().manual_seed(0))
    recipe = SimpleNamespace(model=SimpleNamespace(num_experts=num_experts))
    model = SimpleNamespace(recipe=recipe, logits=lambda row: logits_TV[None])
    from megatron_lpr.conversion.verify.against_logits import EXACT, _compare

    stock = lambda row: SimpleNamespace(logits=logits_TV[None] + change)  # noqa: E731
    return _compare(model, stock, [torch.zeros(1, POSITIONS)], EXACT)


def at(positions, value):
    change = torch.zeros(POSITIONS, VOCAB)
    change[:positions] = value
    return change


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        (at(POSITIONS, 5e-5), True),  # rounding
        (at(POSITIONS, 5e-3), False),  # another model
        (at(4, 0.5), True),  # near ties of two experts
        (at(5, 0.5), False),
        (at(1, float("nan")), False),
    ],
)
def test_a_few_positions_may_differ(change, ok):
    assert check(change).ok == ok


def test_without_experts_there_are_no_ties():
    assert not check(at(1, 0.5), num_experts=0).ok
    assert "1 positions beyond rounding" in check(at(1, 0.5)).detail
