"""The formulas of the losses against numbers worked out by hand."""

import math

import pytest
import torch

from megatron_lpr.losses import (
    GlobalCounts,
    balance_loss,
    lpr_loss,
    lpr_token_loss,
    next_token_loss,
    token_loss_sums,
)


def alone(counts):
    """All-reduce over one rank."""


@pytest.mark.parametrize(
    "probabilities, num_frozen, expected",
    [
        ([1, 1, 1], 1, math.log(3)),
        ([2, 1, 1], 1, math.log(2)),
        ([1, 2, 3], 2, math.log(2)),
        ([1, 1, 1], 2, math.log(1.5)),
    ],
)
def test_lpr_of_a_token_is_minus_log_of_the_frozen_share(probabilities, num_frozen, expected):
    for shift in (0.0, 50.0, -50.0):  # a softmax does not see it
        logits = torch.tensor([probabilities], dtype=torch.float32).log() + shift
        assert lpr_token_loss(logits, num_frozen).item() == pytest.approx(expected, rel=1e-5)


def test_lpr_is_exact_where_a_probability_underflows():
    assert lpr_token_loss(torch.tensor([[0.0, 1000.0]]), 1).item() == 1000.0


def test_lpr_is_fp32_whatever_the_logits_are():
    assert lpr_token_loss(torch.ones(1, 3, dtype=torch.bfloat16), 1).dtype == torch.float32


def test_double_softmax_has_the_floor_of_the_published_code():
    certain = torch.tensor([[100.0, 0, 0, 0, 0, 0]])
    assert lpr_token_loss(certain, 1).item() == pytest.approx(0, abs=1e-6)
    floor = lpr_token_loss(certain, 1, double_softmax=True).item()
    assert floor == pytest.approx(math.log(math.e + 5) - 1)
    assert floor == pytest.approx(1.04, abs=0.005)


def test_double_softmax_has_a_sixth_of_the_gradient():
    gradients = []
    for double in (False, True):
        logits = torch.zeros(1, 6, requires_grad=True)
        lpr_token_loss(logits, 1, double_softmax=double).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], torch.tensor([[-5 / 6, *[1 / 6] * 5]]))
    torch.testing.assert_close(gradients[1], gradients[0] / 6)


def test_lpr_sums_original_tokens_over_their_global_number():
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    share = lpr_loss(losses, torch.tensor([2, -1, 0, 1]), GlobalCounts(original_tokens=10))
    assert share.item() == pytest.approx(0.9)
    share.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0.1, 0, 0, 0.1]))


def test_lpr_without_original_tokens_is_zero_with_a_gradient_of_zero():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    share = lpr_loss(losses, torch.tensor([-1, 0]), GlobalCounts())
    share.backward()
    assert share.item() == 0 and losses.grad.tolist() == [0, 0]


def test_next_token_loss_sums_labelled_positions_over_the_global_number():
    losses = torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.bfloat16)
    share = next_token_loss(losses, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), GlobalCounts(tokens=26))
    assert share.dtype == torch.float32 and share.item() == 0.5


def test_token_losses_are_summed_by_language_in_fp64():
    losses = torch.tensor([[2.0**24, 1.0, 5.0], [4.0, torch.nan, 8.0]])  # 2^24 + 1 is no fp32 number
    sums = token_loss_sums(losses, torch.tensor([[-2, -2, 1], [1, 0, 3]]), 4)
    assert sums.tolist() == [9.0, 2.0**24 + 1, 8.0, 0.0]


def one_sequence(probabilities, chosen, valid=None):
    """[S, B=1, E] probabilities and choices, [S, B=1] validity."""
    p = torch.tensor(probabilities)[:, None]
    c = torch.zeros_like(p, dtype=torch.bool).scatter(-1, torch.tensor(chosen)[:, None], True)
    v = torch.ones(p.shape[:2], dtype=torch.bool) if valid is None else torch.tensor(valid)[:, None]
    return p, c, v


def test_balance_by_hand():
    # f = (1, 0), P = (0.625, 0.375)
    arguments = one_sequence([[0.75, 0.25], [0.5, 0.5]], [[0], [0]])
    assert balance_loss(*arguments, GlobalCounts(), alone).item() == pytest.approx(2 * 0.625)


@pytest.mark.parametrize("num_experts, topk", [(2, 1), (4, 2), (6, 2), (6, 6)])
def test_balance_of_even_routing_is_one(num_experts, topk):
    p = [[1 / num_experts] * num_experts] * num_experts
    chosen = [[(token + slot) % num_experts for slot in range(topk)] for token in range(num_experts)]
    assert balance_loss(*one_sequence(p, chosen), GlobalCounts(), alone).item() == pytest.approx(1)


def test_balance_of_one_busy_expert_is_the_number_of_experts():
    arguments = one_sequence([[1.0, 0.0, 0.0]] * 4, [[0]] * 4)
    assert balance_loss(*arguments, GlobalCounts(), alone).item() == pytest.approx(3)


def test_balance_leaves_padding_out():
    alike = one_sequence([[0.75, 0.25], [0.5, 0.5]], [[0], [0]])
    padded = one_sequence([[0.75, 0.25], [0.0, 1.0], [0.5, 0.5]], [[0], [1], [0]], [True, False, True])
    with_padding = balance_loss(*padded, GlobalCounts(), alone)
    assert with_padding.item() == pytest.approx(balance_loss(*alike, GlobalCounts(), alone).item())


def test_balance_of_padding_alone_is_zero():
    arguments = one_sequence([[0.75, 0.25]], [[0]], [False])
    assert balance_loss(*arguments, GlobalCounts(), alone).item() == 0


def two_sequences_that_cancel():
    """Sequence 0 goes to expert 0 alone, sequence 1 to expert 1."""
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 3)
    return p, p.bool(), torch.ones(3, 2, dtype=torch.bool)


def test_balance_groups_are_sequences_or_the_micro_batch():
    arguments = two_sequences_that_cancel()
    assert balance_loss(*arguments, GlobalCounts(balance_groups=2), alone).item() == pytest.approx(2)
    together = balance_loss(*arguments, GlobalCounts(), alone, per_sequence=False)
    assert together.item() == pytest.approx(1)


def test_balance_is_divided_by_the_global_number_of_groups():
    arguments = two_sequences_that_cancel()
    assert balance_loss(*arguments, GlobalCounts(balance_groups=8), alone).item() == pytest.approx(0.5)


def test_balance_of_sequence_shards_adds_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(6, 3, 4, generator=generator, dtype=torch.double).softmax(-1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(2).indices, True)
    valid = torch.rand(6, 3, generator=generator) > 0.3
    whole = balance_loss(p, chosen, valid, GlobalCounts(), alone)
    sent = []
    for rows in (slice(0, 2), slice(2, 6)):  # what each shard hands to the all-reduce
        balance_loss(p[rows], chosen[rows], valid[rows], GlobalCounts(), lambda counts: sent.append(counts.clone()))
    shares = [
        balance_loss(p[rows], chosen[rows], valid[rows], GlobalCounts(), lambda counts: counts.copy_(sum(sent)))
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-6)
