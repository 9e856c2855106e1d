"""Sums per language against counting by hand."""

from functools import partial

import torch

from megatron_lpr.losses import lpr_token_loss
from megatron_lpr.model.router_stats import LPR_LOSS, P_FROZEN, SLOTS, TOKENS, RouterStats

TOKEN_LOSS = partial(lpr_token_loss, num_frozen=1)


def collector(num_languages=2, num_experts=3):
    stats = RouterStats(num_experts)
    stats.num_languages = num_languages
    return stats


def routed(*tokens):
    """Logits [T, E] from probabilities, the top-2 choice, and tags: (tag, p0, p1, p2) per token."""
    probabilities = torch.tensor([token[1:] for token in tokens])
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, probabilities.topk(2).indices, True)
    return probabilities.log(), chosen, torch.tensor([token[0] for token in tokens])


def test_sums_by_language():
    stats = collector()
    stats.add(*routed((-1, 0.5, 0.4, 0.1), (2, 0.25, 0.5, 0.25 - 1e-3), (0, 0.9, 0.05, 0.05)), TOKEN_LOSS)
    stats.add(*routed((-1, 0.2, 0.3, 0.5)), TOKEN_LOSS)
    sums, balance, _ = stats.take()
    assert sums.dtype == torch.float64 and balance.item() == 0
    assert sums[:, TOKENS].tolist() == [2, 1]
    torch.testing.assert_close(sums[0, P_FROZEN].item(), 0.7, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[0, LPR_LOSS].item(), 2.302585, rtol=1e-6, atol=0)  # -ln 0.5 - ln 0.2
    assert sums[:, SLOTS:].tolist() == [[1, 2, 1], [1, 1, 0]]


def test_frozen_experts_have_their_probabilities_together():
    stats = collector()
    stats.add(*routed((1, 0.5, 0.3, 0.2)), partial(lpr_token_loss, num_frozen=2))
    torch.testing.assert_close(stats.take()[0][0, P_FROZEN].item(), 0.8, rtol=1e-6, atol=0)


def test_take_starts_again():
    stats = collector()
    stats.add(*routed((1, 0.5, 0.4, 0.1)), TOKEN_LOSS)
    stats.balance += torch.tensor(0.25)
    assert stats.take()[1].item() == 0.25
    sums, balance, _ = stats.take()
    assert sums.shape == (2, SLOTS + 3) and not sums.any() and balance.item() == 0


def test_nothing_is_collected_unasked():
    stats = collector(num_languages=0)
    stats.add(*routed((1, 0.5, 0.4, 0.1)), TOKEN_LOSS)
    assert stats.sums_LC is None


def test_tags_of_a_2d_mask_are_taken_in_the_order_of_the_tokens():
    stats = collector()
    logits, chosen, _ = routed((1, 0.5, 0.4, 0.1), (1, 0.2, 0.3, 0.5))
    stats.add(logits, chosen, torch.tensor([[2], [-1]]), TOKEN_LOSS)
    assert stats.take()[0][:, SLOTS:].tolist() == [[0, 1, 1], [1, 1, 0]]
