"""The dispatcher carries slots of new experts only, and a review keeps expert-parallel ranks evenly loaded."""

import pytest

from megatron_lpr.testing.dispatch_counts import TOPK, count_dispatch

RANKS, TOKENS, NEW_EXPERTS = 4, 2048, 12  # 12 new experts suit our layer and Megatron's on four ranks
BATCHES = {"original": [1.0] * RANKS, "mixed": [0.5] * RANKS, "uneven": [1.0, 0.3, 0.0, 0.6], "expanded": [0.0] * RANKS}


@pytest.fixture(scope="module")
def counts(on_ranks, toy_base):
    """By batch, what each rank did."""
    by_rank = on_ranks(count_dispatch, RANKS, toy_base, NEW_EXPERTS, TOKENS, list(BATCHES.values()))
    return dict(zip(BATCHES, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize("batch", BATCHES)
def test_only_slots_of_new_experts_are_sent(counts, batch):
    for rank, original in zip(counts[batch], BATCHES[batch], strict=True):
        assert rank.frozen_slots == round(original * TOKENS)
        assert rank.new_slots == TOPK * TOKENS - rank.frozen_slots
    # there and back
    assert sum(rank.ours.sent_rows for rank in counts[batch]) == 2 * sum(rank.new_slots for rank in counts[batch])
    assert sum(rank.megatron.sent_rows for rank in counts[batch]) == 2 * RANKS * TOPK * TOKENS


@pytest.mark.parametrize("batch", BATCHES)
def test_every_slot_is_computed_once(counts, batch):
    for layer in ("ours", "megatron"):
        computed = sum(getattr(rank, layer).computed_rows for rank in counts[batch])
        assert computed == RANKS * TOPK * TOKENS, layer


@pytest.mark.parametrize("batch", ["original", "mixed", "expanded"])
def test_ranks_are_evenly_loaded(counts, batch):
    mean = TOPK * TOKENS
    assert max(rank.ours.computed_rows for rank in counts[batch]) <= 1.05 * mean
    if batch == "original":
        # on the rank of the frozen expert: half of all slots
        assert max(rank.megatron.computed_rows for rank in counts[batch]) == RANKS / 2 * mean
