"""Mixtures that take over from one another: each corpus goes on where it was."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampler_oracle import BOUND, shares, weights

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import ScheduleEntry


def test_schedule_neither_repeats_nor_skips(sampler_of):
    """Whatever the mixtures, each corpus' samples are its 0th, 1st, 2nd, ...; and each piece is exact in itself."""
    schedule = (
        ScheduleEntry(from_sample=101, mixture={"expanded": 0.01, "original": 0.99}),
        ScheduleEntry(from_sample=350, weights={"expanded0": 0, "original1": 7.5}),
        ScheduleEntry(from_sample=351, mixture={"original": 1.0}),
        ScheduleEntry(from_sample=600, weights={"expanded1": 0.1}),
    )
    sampler = sampler_of([1, 2, 0.3], [5, 1], {"expanded": 0.7, "original": 0.3}, schedule)
    assert [m.first_sample for m in sampler.mixtures] == [0, 101, 350, 351, 600]
    picks = sampler.picks(0, 1000).tolist()
    counts, before = [0] * 5, [0] * 5
    for k, (corpus, _, index) in enumerate(picks):
        mixture = [m for m in sampler.mixtures if m.first_sample <= k][-1]
        if mixture.first_sample == k:
            before = list(counts)
        assert index == counts[corpus]
        counts[corpus] += 1
        here = k + 1 - mixture.first_sample
        for corpus in range(5):
            assert abs(counts[corpus] - before[corpus] - here * mixture.shares[corpus]) < BOUND
        assert sampler.samples_before(k + 1) == counts
    assert sampler.mixtures[2].shares[0] == 0 and sampler.mixtures[3].shares[:3] == (0, 0, 0)
    for first in (0, 100, 101, 349, 350, 351, 352, 599, 999):
        assert sampler.picks(first, 1000 - first).tolist() == picks[first:]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    expanded=weights,
    original=weights,
    pieces=st.lists(st.tuples(st.integers(1, 150), shares), max_size=4),
    far=st.sampled_from([0, 10**12]),
)
def test_any_schedule_neither_repeats_nor_skips(sampler_of, expanded, original, pieces, far):
    schedule, start = [], far
    for length, share in pieces:
        start += length
        schedule.append(ScheduleEntry(from_sample=start, mixture={"expanded": share, "original": 1 - share}))
    sampler = sampler_of(expanded, original, {"expanded": 0.5, "original": 0.5}, tuple(schedule))
    counts = sampler.samples_before(far)
    for corpus, _, index in sampler.picks(far, 700).tolist():
        assert index == counts[corpus]
        counts[corpus] += 1
    assert counts == sampler.samples_before(far + 700)


@pytest.mark.parametrize(
    "schedule, message",
    [
        ([(5, {"expanded": 1}, {}), (5, {"expanded": 1}, {})], r"schedule\[1\].from_sample: 5 does not come after 5"),
        ([(0, {"expanded": 1}, {})], "the mixture from sample 0 on is data.mixture"),
        ([(5, {"expandd": 1}, {})], "did you mean 'expanded'"),
        ([(5, None, {"expanded": 1})], "no corpus 'expanded' in .*did you mean 'expanded0'"),
        ([(5, None, {"expanded0": -1})], r"data.schedule\[0\].weights.expanded0: -1; at least 0"),
        ([(5, None, {"expanded0": 0})], r"asks for expanded data, but no corpus .* has that role \(and a weight\)"),
    ],
)
def test_impossible_schedules(sampler_of, schedule, message):
    pieces = [ScheduleEntry(from_sample=start, mixture=mixture, weights=w) for start, mixture, w in schedule]
    with pytest.raises(UserError, match=message):
        sampler_of([1], [1], {"expanded": 0.5, "original": 0.5}, pieces)
