"""The keyed permutation of csrc/permutation.h."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from sampler_oracle import permuted

from megatron_lpr._replay_sampler import permute

MASK = (1 << 64) - 1


def assert_bijection(size: int, *key: int):
    images = permute(size, *key, 0, size)
    assert (np.bincount(images.astype(np.int64), minlength=size) == 1).all(), size
    np.testing.assert_array_equal(permute(size, *key, 0, size, inverse=True)[images], np.arange(size))


@pytest.mark.slow
def test_is_a_bijection_with_an_inverse_for_every_small_size():
    for size in range(1, 5001):
        assert_bijection(size, 7, size, 0)


@pytest.mark.parametrize("bits", range(13, 21))
def test_is_a_bijection_around_powers_of_two(bits):
    for size in (2**bits - 1, 2**bits, 2**bits + 1):
        assert_bijection(size, 1, 2, 3)


LARGE = [10**6, 2**32 - 1, 2**32, 2**32 + 1, 2**48 - 1, 10**18, 2**62 + 1, 2**63]


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, *LARGE])
def test_agrees_with_the_oracle(size):
    first = max(0, size // 2 - 10)
    count = min(20, size - first)
    for key in ((0, 0, 0), (1234, MASK, 5), (2**63 - 1, 17, 2**40)):
        images = permute(size, *key, first, count).tolist()
        assert images == [permuted(size, *key, index) for index in range(first, first + count)]


@pytest.mark.parametrize("size", LARGE)
def test_the_inverse_of_large_sizes(size):
    for first in (0, size // 3, size - 100):
        images = permute(size, 5, 6, 7, first, 100).tolist()
        assert [int(permute(size, 5, 6, 7, image, 1, inverse=True)[0]) for image in images] == list(
            range(first, first + 100)
        )


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_every_part_of_the_key_selects_another_order(changed):
    key = [3, 4, 5]
    before = permute(1000, *key, 0, 1000)
    key[changed] += 1
    # Two independent permutations agree in one place on average.
    assert (before == permute(1000, *key, 0, 1000)).sum() < 10


@pytest.mark.parametrize("size", [10_000, 65_536, 1_000_003])
def test_neighbours_are_uncorrelated(size):
    for seed in range(5):
        images = permute(size, seed, 0, 0, 0, size).astype(float)
        assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 3 / np.sqrt(size)


@pytest.mark.slow
@pytest.mark.parametrize("lag", [1, 2, 1000])
def test_as_many_distinct_differences_as_a_random_permutation(lag):
    """n draws from n residues hit n (1 - 1/e) of them; within 0.5% at a million (ten standard deviations)."""
    size = 1_000_000
    images = permute(size, 3, 1, 4, 0, size).astype(np.int64)
    distinct = len(np.unique((images[lag:] - images[:-lag]) % size))
    assert abs(distinct / (size * (1 - math.exp(-1))) - 1) < 0.005


@pytest.mark.parametrize("size, limit", [(2, 10.8), (3, 20.5), (4, 49.7), (5, 174.6)])
def test_tiny_ranges_are_shuffled_evenly(size, limit):
    """Every order is equally likely over seeds: chi-square, exceeded by one fair shuffle in a thousand."""
    seeds = 12_000
    orders = Counter(tuple(permute(size, seed, 0, 0, 0, size).tolist()) for seed in range(seeds))
    expected = seeds / math.factorial(size)
    assert sum((orders[o] - expected) ** 2 / expected for o in permutations(range(size))) < limit


@pytest.mark.parametrize("size", [100, 1009])
def test_every_place_gets_every_image_equally_often(size):
    """Over seeds the image of a fixed index is uniform: chi-square with size - 1 degrees of freedom, four sigma."""
    seeds = 50 * size
    for index in (0, size - 1):
        hits = np.bincount([permute(size, seed, 9, 2, index, 1)[0] for seed in range(seeds)], minlength=size)
        chi_square = ((hits - 50) ** 2 / 50).sum()
        assert abs(chi_square - (size - 1)) < 4 * np.sqrt(2 * (size - 1))


def test_refuses_an_index_past_the_end():
    with pytest.raises(IndexError, match="past the end"):
        permute(10, 0, 0, 0, 9, 2)
    with pytest.raises(IndexError, match="past the end"):
        permute(10, 0, 0, 0, 10, 1, inverse=True)
    with pytest.raises(ValueError, match="1 to 2\\^63"):
        permute(0, 0, 0, 0, 0, 1)
