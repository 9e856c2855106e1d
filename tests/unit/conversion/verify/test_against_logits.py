"""Which differences between the logits of Megatron and of transformers are rounding."""

import functools
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.megatron

POSITIONS, VOCAB = 400, 8


@pytest.fixture(autouse=True)
def prepared(megatron_imported):
    """`against_logits` is imported after Megatron was prepared."""


@pytest.fixture
def check(monkeypatch):
    return functools.partial(checked, monkeypatch)


def checked(monkeypatch, change, *, num_experts=3, gap_at=None, tolerance="EXACT", scale=1.0, topk=2):
    """The check of a stock model that computes `change` beside the Megatron model's logits."""
    logits_TV = torch.randn(POSITIONS, VOCAB, generator=torch.Generator().manual_seed(0)) * scale
    recipe = SimpleNamespace(model=SimpleNamespace(num_experts=num_experts))
    router = Router(gap_at or {}, scale, topk)

    def logits(row):
        router(row)
        return logits_TV[None]

    model = SimpleNamespace(recipe=recipe, logits=logits, chunks=[])
    from megatron_lpr.conversion.verify import against_logits

    monkeypatch.setattr(against_logits, "routers", lambda *chunks: [router])
    stock = lambda row: SimpleNamespace(logits=logits_TV[None] + change)  # noqa: E731
    return against_logits._compare(model, stock, [torch.zeros(1, POSITIONS)], getattr(against_logits, tolerance))


class Router(torch.nn.Module):
    """Two of three experts: 5 and 4, and 3 but for the positions that have another gap to the second."""

    def __init__(self, gap_at, scale, topk):
        super().__init__()
        self.topk = topk
        self.logits = torch.tensor([4.0, 3.0, 5.0]).repeat(POSITIONS, 1, 1)
        for position, gap in gap_at.items():
            self.logits[position, 0, 1] = 4 - gap
        self.logits *= scale

    def forward(self, row):
        return row

    def gating(self, row):
        return self.logits


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
def test_a_few_positions_may_differ(check, change, ok):
    assert check(change).ok == ok


def test_rounding_and_ties_are_relative_to_the_largest(check):
    found = check(at(POSITIONS, 5e-3), scale=500.0)
    assert found.ok and "max |difference| 5.0e-03 of logits up to " in found.detail and "mean 5.0e-03" in found.detail
    assert not check(at(POSITIONS, 5e-4), scale=0.02).ok  # but not below 1
    assert check(behind(90), gap_at={90: 1e-6}, scale=500.0).ok  # 5e-4 of 2500


def test_where_all_experts_are_chosen_there_are_no_ties(check):
    assert "at or behind a tie" in check(behind(90), gap_at={90: 1e-6}).detail
    assert not check(behind(90), gap_at={90: 1e-6}, topk=3).ok


def test_without_experts_there_are_no_ties(check):
    assert not check(at(1, 0.5), num_experts=0).ok
    assert "1 positions beyond rounding" in check(at(1, 0.5)).detail


def behind(position):
    change = torch.zeros(POSITIONS, VOCAB)
    change[position:] = 0.5
    return change


def test_what_attends_to_a_tie_says_nothing(check):
    """A tie in the middle of a text changes all that follows: more positions than may differ, and no fault."""
    found = check(behind(90), gap_at={90: 1e-6})
    assert found.ok and f"{POSITIONS - 90} at or behind a tie of two experts" in found.detail
    assert not check(behind(90)).ok  # no tie
    assert not check(behind(90), gap_at={91: 1e-6, 89: 1e-6}).ok  # it begins elsewhere
    assert not check(behind(90), gap_at={90: 1e-2}).ok  # rounding does not choose otherwise there
    assert not check(behind(90), gap_at={90: 1e-6}, tolerance="ROUNDED").ok  # in bfloat16 ties are everywhere
