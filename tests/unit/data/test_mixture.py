"""Exact mixtures: counts of every prefix, against the weights and against a slow scheduler."""

from fractions import Fraction
from math import floor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lpr.data.manifest import Corpus, Manifest, TokenizerRecord
from megatron_lpr.data.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError

# Corpora of one window each: the epoch of a pick is then its corpus' number of earlier picks.
SEQ_LENGTH = 4


@pytest.fixture
def sampler_of(write_corpus):
    prefix = write_corpus("one_window", [[5, 6, 7]])

    def make(expanded: list[float], original: list[float], mixture: dict[str, float]) -> ReplaySampler:
        corpora = [
            Corpus(
                name=f"{role}{number}",
                prefix=prefix,
                language=f"{role}{number}",
                role=role,
                weight=weight,
                documents=1,
                tokens=3,
                digest=f"{number:064x}",
            )
            for role, weights in (("expanded", expanded), ("original", original))
            for number, weight in enumerate(weights)
        ]
        tokenizer = TokenizerRecord(name="toy", vocab_size=1000, sha256="0" * 64, eod_id=2)
        manifest = Manifest(path="manifest.yaml", tokenizer=tokenizer, corpora=tuple(corpora))
        return ReplaySampler(manifest, seq_length=SEQ_LENGTH, seed=1, mixture=mixture)

    return make


def last_slot(share: Fraction, count: int) -> int:
    """The last slot in which a corpus with `count` samples so far may get its next one."""
    slot = count
    while (slot + 1) * share - count < 1 - share / 2:
        slot += 1
    return slot


def order_in_role(weights: list[int], length: int) -> list[int]:
    """Earliest deadline first under |count - n * share| < 1 - share / 2, from the bound itself."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    counts = [0] * len(weights)
    order = []
    for n in range(1, length + 1):
        allowed = [c for c, share in enumerate(shares) if counts[c] + 1 - n * share < 1 - share / 2]
        chosen = min(allowed, key=lambda c: (last_slot(shares[c], counts[c]), c))
        counts[chosen] += 1
        order.append(chosen)
    return order


def oracle(expanded: list[int], original: list[int], share: Fraction, length: int) -> list[tuple[int, int]]:
    """(corpus, number of its earlier picks) of the first samples, by bookkeeping."""
    orders = [order_in_role(expanded, length), order_in_role(original, length)]
    used = [0, 0]
    counts = [0] * (len(expanded) + len(original))
    picks = []
    for k in range(length):
        is_expanded = floor((k + 1) * share + Fraction(1, 2)) > floor(k * share + Fraction(1, 2))
        role = 0 if is_expanded else 1
        corpus = orders[role][used[role]] + (0 if is_expanded else len(expanded))
        used[role] += 1
        picks.append((corpus, counts[corpus]))
        counts[corpus] += 1
    return picks


@pytest.mark.parametrize(
    "expanded, original, share",
    [
        ([1], [1], Fraction(1, 2)),
        ([3, 1], [1], Fraction(9, 10)),
        ([1, 1, 1], [5, 2], Fraction(1, 3)),
        ([7, 5, 3, 1], [1, 99, 1], Fraction(99, 100)),
        ([2, 4, 6], [10, 10], Fraction(123, 1000)),
        # Any rounding of the deadlines but the exact one orders these differently.
        ([7, 1, 5, 9, 8], [1], Fraction(3, 5)),
    ],
)
def test_agrees_with_the_oracle(sampler_of, expanded, original, share):
    sampler = sampler_of(expanded, original, {"expanded": float(share), "original": float(1 - share)})
    picks = sampler.picks(0, 200)
    assert [(int(corpus), int(epoch)) for corpus, _, epoch in picks] == oracle(expanded, original, share, 200)


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
            assert abs(count * share.denominator - k * share.numerator) < share.denominator
        assert abs(expanded - k * expanded_share) <= Fraction(1, 2)


weights = st.lists(
    st.one_of(st.integers(1, 9), st.floats(0.01, 10), st.sampled_from([0.001, 0.999, 1 / 3])),
    min_size=1,
    max_size=6,
)
shares = st.one_of(st.sampled_from([1e-6, 1 - 1e-6, 0.5, 1 / 3, 0.999]), st.floats(1e-6, 1 - 1e-6))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expanded=weights, original=weights, share=shares)
def test_every_prefix_is_within_one_of_its_share(sampler_of, expanded, original, share):
    sampler = sampler_of(expanded, original, {"expanded": share, "original": 1 - share})
    assert_exact_prefixes(sampler, 400)


def test_many_corpora(sampler_of):
    sampler = sampler_of([1 + number % 7 for number in range(300)], [1], {"expanded": 0.75, "original": 0.25})
    counts = [0] * 301
    for k, (corpus, _, index) in enumerate(sampler.picks(0, 5000).tolist(), start=1):
        assert index == counts[corpus]
        counts[corpus] += 1
        assert abs(counts[corpus] - k * sampler.shares[corpus]) < 1
    assert all(abs(count - 5000 * share) < 1 for count, share in zip(counts, sampler.shares, strict=True))


@pytest.mark.parametrize("first", [10**6, 2**40 - 3, 2**61])
def test_random_access_far_into_a_run(sampler_of, first):
    sampler = sampler_of([0.7, 0.2, 0.1], [1, 2], {"expanded": 1 - 1e-6, "original": 1e-6})
    for k, (corpus, _, index) in enumerate(sampler.picks(first, 200).tolist(), start=first + 1):
        assert abs(index + 1 - k * sampler.shares[corpus]) < 1


def test_shares_are_what_was_written(sampler_of):
    sampler = sampler_of([0.1, 0.2], [3, 1], {"expanded": 0.001, "original": 0.999})
    assert sampler.shares == (
        Fraction(1, 3000), Fraction(2, 3000), Fraction(999 * 3, 4000), Fraction(999, 4000)
    )  # fmt: skip


def test_unrelated_weights_are_rounded_to_a_fine_grid(sampler_of):
    sampler = sampler_of([123456789, 987654321, 31415926.5], [], {"expanded": 1})
    total = 123456789 + 987654321 + 31415926.5
    assert sum(sampler.shares) == 1
    for share, weight in zip(sampler.shares, (123456789, 987654321, 31415926.5), strict=True):
        assert abs(share - Fraction(weight) / Fraction(total)) < Fraction(1, 2**18)


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
        ([1], [1], {"expanded": -1.0}, "must be a number >= 0"),
        ([1], [1], {"expanded": float("nan")}, "must be a number >= 0"),
        ([1], [1], {}, "asks for no data"),
        ([1], [1], {"expanded": 1.0, "original": 1e-30}, "original data is too small"),
        ([1, 1e-9], [], {"expanded": 1.0}, "weight of corpus 'expanded1'"),
    ],
)
def test_impossible_mixtures(sampler_of, expanded, original, mixture, message):
    with pytest.raises(UserError, match=message):
        sampler_of(expanded, original, mixture)
