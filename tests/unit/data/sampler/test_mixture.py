"""Exact mixtures: counts of every prefix, against the weights and against a slow scheduler."""

from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampler_oracle import BOUND, draws, shares, weights

from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError


@pytest.mark.parametrize(
    "expanded, original, share",
    [
        ([1], [1], Fraction(1, 2)),
        ([3, 1], [1], Fraction(9, 10)),
        ([1, 1, 1], [5, 2], Fraction(1, 3)),
        ([7, 5, 3, 1], [1, 99, 1], Fraction(99, 100)),
        ([2, 4, 6], [10, 10], Fraction(123, 1000)),
        ([7, 1, 5, 9, 8], [1], Fraction(3, 5)),
        ([1, 1, 2, 3, 5, 8, 13], [999, 1], Fraction(1, 2)),
    ],
)
def test_agrees_with_the_oracle(sampler_of, expanded, original, share):
    sampler = sampler_of(expanded, original, {"expanded": float(share), "original": float(1 - share)})
    picks = sampler.picks(0, 200)
    assert [(int(corpus), int(epoch)) for corpus, _, epoch in picks] == draws(expanded, original, share, 200)


def assert_exact_prefixes(sampler: ReplaySampler, length: int):
    counts = [0] * len(sampler.shares)
    expanded = 0
    expanded_share = sum(
        share for share, corpus in zip(sampler.shares, sampler.manifest.corpora, strict=True)
        if corpus.role == "expanded"
    )  # fmt: skip
    for k, (corpus, _, index) in enumerate(sampler.picks(0, length).tolist(), start=1):
        assert index == counts[corpus]
        counts[corpus] += 1
        expanded += sampler.manifest.corpora[corpus].role == "expanded"
        for count, share in zip(counts, sampler.shares, strict=True):
            assert abs(count * share.denominator - k * share.numerator) < BOUND * share.denominator
        assert abs(expanded - k * expanded_share) <= Fraction(1, 2)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(expanded=weights, original=weights, share=shares)
def test_every_prefix_is_within_the_bound_of_its_share(sampler_of, expanded, original, share):
    sampler = sampler_of(expanded, original, {"expanded": share, "original": 1 - share})
    assert_exact_prefixes(sampler, 400)


def test_many_corpora(sampler_of):
    sampler = sampler_of([1 + number % 7 for number in range(300)], [1], {"expanded": 0.75, "original": 0.25})
    counts = [0] * 301
    for k, (corpus, _, index) in enumerate(sampler.picks(0, 5000).tolist(), start=1):
        assert index == counts[corpus]
        counts[corpus] += 1
        assert abs(counts[corpus] - k * sampler.shares[corpus]) < BOUND
    assert all(abs(count - 5000 * share) < BOUND for count, share in zip(counts, sampler.shares, strict=True))


@pytest.mark.parametrize("first", [10**6, 2**40 - 3, 2**61])
def test_random_access_far_into_a_run(sampler_of, first):
    sampler = sampler_of([0.7, 0.2, 0.1], [1, 2], {"expanded": 1 - 1e-6, "original": 1e-6})
    for k, (corpus, _, index) in enumerate(sampler.picks(first, 200).tolist(), start=first + 1):
        assert abs(index + 1 - k * sampler.shares[corpus]) < BOUND


def test_shares_are_what_was_written(sampler_of):
    sampler = sampler_of([0.1, 0.2], [3, 1], {"expanded": 0.001, "original": 0.999})
    assert sampler.shares == (
        Fraction(1, 3000), Fraction(2, 3000), Fraction(999 * 3, 4000), Fraction(999, 4000)
    )  # fmt: skip


def test_unrelated_weights_are_exact(sampler_of):
    weights = (123456789, 987654321, 31415926.5)
    sampler = sampler_of(list(weights), [], {"expanded": 1})
    assert sampler.shares == tuple(Fraction(weight) / Fraction(sum(weights)) for weight in weights)
    assert_exact_prefixes(sampler, 400)


@pytest.mark.parametrize(
    "expanded, original",
    [
        ([1e-6, 1 - 1e-6], [1]),
        ([1e-6, 1 - 1e-6], [1 - 1e-6, 1e-6]),
        ([0.999, 0.001, 0.0001], [1, 3]),
        ([0.1234567890123, 0.7654321098765, 1e-6], [2.718281828459045, 3.141592653589793]),
    ],
)
@pytest.mark.parametrize("share", [1e-6, 0.5, 1 - 1e-6])
def test_adversarial_weights_at_both_levels_far_into_a_run(sampler_of, expanded, original, share):
    """At samples far from 0, reached without those before: every count is within the bound of what was asked for."""
    of_role = Fraction(str(share)), 1 - Fraction(str(share))
    sampler = sampler_of(expanded, original, {"expanded": share, "original": float(of_role[1])})
    asked = [
        role_share * Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights)
        for role_share, weights in zip(of_role, (expanded, original), strict=True)
        for weight in weights
    ]
    assert list(sampler.shares) == asked
    for first in (0, 999_990, 10**9 + 7, 2**41 + 12345, 2**60):
        counts = sampler.samples_before(first)
        assert sum(counts) == first
        for k, (corpus, _, index) in enumerate(sampler.picks(first, 2000).tolist(), start=first + 1):
            assert index == counts[corpus]
            counts[corpus] += 1
            assert all(abs(count - k * share) < BOUND for count, share in zip(counts, asked, strict=True))


def bound(weights: list[int], corpus: int) -> Fraction:
    """(1 + w / W_1 + w / W_2 + ...) / 2 over the weights of the nodes that hold a corpus, of the tree in mixture.h."""
    nodes = [(weight, number, {number}) for number, weight in enumerate(weights)]
    total = Fraction(1)
    for number in range(len(weights), 2 * len(weights) - 1):
        nodes.sort(key=lambda node: node[:2])
        light, heavy, *nodes = nodes
        joined = (light[0] + heavy[0], number, light[2] | heavy[2])
        total += Fraction(weights[corpus], joined[0]) if corpus in joined[2] else 0
        nodes.append(joined)
    return total / 2


tree_weights = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.lists(st.integers(10**5, 10**17), min_size=2, max_size=9),
    st.sampled_from([[1, 999], [999, 1, 1], [1, 10**9, 10**18], [3**i for i in range(36)], [1] * 60]),
    # the weights that a Fibonacci tree has, and their like with one that is next to nothing
    st.integers(2, 40).map(lambda n: [1, *(round(10**6 * 1.618034**i) for i in range(n))]),
    st.integers(2, 60).map(lambda n: [10**6 + (i % 3) for i in range(n)]),
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    weights=tree_weights,
    share=st.one_of(st.sampled_from([0.5, 0.999, 1.0]), shares),
    first=st.one_of(st.integers(0, 10**12), st.integers(2**61, 2**62 - 60)),
)
def test_every_count_is_within_the_bound_of_its_place_in_the_tree(sampler_of, weights, share, first):
    sampler = sampler_of(weights, [1], {"expanded": share, "original": 1 - share})
    exact = sampler.mixtures[0].weights[:-1]
    bounds = [bound(list(exact), corpus) for corpus in range(len(exact))] + [Fraction(1, 2)]
    assert max(bounds) < BOUND
    counts = sampler.samples_before(first)
    picked = [corpus for corpus, *_ in sampler.picks(first, 40).tolist()]
    for k, corpus in enumerate([None, *picked], start=first):
        if corpus is not None:
            counts[corpus] += 1
        assert counts == sampler.samples_before(k)
        for count, corpus_share, most in zip(counts, sampler.shares, bounds, strict=True):
            assert abs(count - k * corpus_share) <= most


def test_weights_of_very_different_size(sampler_of):
    """1e12 samples, one in a thousand of one corpus, one in 1e12 of another."""
    sampler = sampler_of([0.001, 0.999, 1e-12], [1], {"expanded": 1.0})
    total = Fraction(1) + Fraction(1, 10**12)
    for k in (10**12, 10**12 + 1, 3 * 10**12 // 2):
        counts = sampler.samples_before(k)
        for count, weight in zip(counts, ("0.001", "0.999", "0.000000000001"), strict=False):
            assert abs(count - k * Fraction(weight) / total) < BOUND
    picks = sampler.picks(5 * 10**11, 10_000)[:, 0].tolist()
    assert 8 <= picks.count(0) <= 12


@pytest.mark.parametrize("weights", [[7, 5, 3, 1], [10**15 + i for i in range(9)], [1] * 300, [0.999, 0.001]])
def test_walking_and_counting_agree_from_anywhere(sampler_of, weights):
    sampler = sampler_of(weights, [2, 1], {"expanded": 0.7, "original": 0.3})
    whole = sampler.picks(0, 2000).tolist()
    for first in (1, 2, 299, 1000, 1997):
        assert sampler.picks(first, 2000 - first).tolist() == whole[first:]
    for first in (0, 10**12, 2**62 - 500):
        counts = sampler.samples_before(first)
        for corpus, _, index in sampler.picks(first, 500).tolist():
            assert index == counts[corpus]
            counts[corpus] += 1
        assert counts == sampler.samples_before(first + 500)


def test_a_role_without_share_is_never_read(sampler_of):
    sampler = sampler_of([1], [1], {"expanded": 1.0})
    assert set(sampler.picks(0, 100)[:, 0].tolist()) == {0}
    sampler = sampler_of([1], [1], {"original": 2.0, "expanded": 0})
    assert set(sampler.picks(0, 100)[:, 0].tolist()) == {1}


@pytest.mark.parametrize(
    "expanded, original, mixture, message",
    [
        (
            [1],
            [],
            {"expanded": 0.5, "original": 0.5},
            "review without original-language data.*role: original",
        ),
        ([], [1], {"expanded": 1.0}, "asks for expanded data.*role: expanded"),
        ([1], [1], {"expandd": 1.0}, "did you mean 'expanded'"),
        ([1], [1], {"expanded": -1.0}, "data.mixture.expanded: -1.0; at least 0"),
        ([1], [1], {"expanded": float("nan")}, "data.mixture.expanded: nan; at least 0"),
        ([1], [1], {}, "asks for no data"),
        ([1], [1], {"expanded": 1.0, "original": 1e-30}, "original data is too small"),
        ([1, 5e-19], [], {"expanded": 1.0}, r"weight of corpus 'expanded1' is below 1 in 2\^60 of its role"),
    ],
)
def test_impossible_mixtures(sampler_of, expanded, original, mixture, message):
    with pytest.raises(UserError, match=message):
        sampler_of(expanded, original, mixture)
