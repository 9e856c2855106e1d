"""The keyed permutation of csrc/permutation.h."""

import numpy as np
import pytest

from megatron_lpr._replay_sampler import permute

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def oracle(size: int, seed: int, stream: int, epoch: int, index: int) -> int:
    """The same permutation in unbounded Python integers."""
    half_bits = 4
    while size > 1 << (2 * half_bits):
        half_bits += 1
    state = 0
    for word in (seed, stream, epoch):
        state = mix((state + word + GOLDEN) & MASK)
    round_keys = [mix((state + round_ * GOLDEN) & MASK) for round_ in range(1, 9)]
    half = 1 << half_bits
    while True:
        left, right = divmod(index, half)
        for key in round_keys:
            left, right = right, left ^ (mix(right ^ key) % half)
        index = left * half + right
        if index < size:
            return index


def test_is_a_bijection_for_every_small_size():
    for size in range(1, 1001):
        assert sorted(permute(size, 7, size, 0, 0, size).tolist()) == list(range(size))


@pytest.mark.parametrize("bits", [8, 9, 10, 15, 16])
def test_is_a_bijection_around_powers_of_two(bits):
    for size in (2**bits - 1, 2**bits, 2**bits + 1):
        seen = np.zeros(size, dtype=bool)
        seen[permute(size, 1, 2, 3, 0, size)] = True
        assert seen.all()


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 10**6, 2**32, 2**32 + 1, 2**48 - 1, 2**62 + 1, 2**63])
def test_agrees_with_the_oracle(size):
    first = max(0, size // 2 - 10)
    count = min(20, size - first)
    for key in ((0, 0, 0), (1234, MASK, 5), (2**63 - 1, 17, 2**40)):
        images = permute(size, *key, first, count).tolist()
        assert images == [oracle(size, *key, index) for index in range(first, first + count)]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_every_part_of_the_key_selects_another_order(changed):
    key = [3, 4, 5]
    before = permute(1000, *key, 0, 1000)
    key[changed] += 1
    # Two independent permutations agree in one place on average.
    assert (before == permute(1000, *key, 0, 1000)).sum() < 10


@pytest.mark.parametrize("size", [10_000, 65_536])
def test_neighbours_are_uncorrelated(size):
    for seed in range(5):
        images = permute(size, seed, 0, 0, 0, size).astype(float)
        assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 3 / np.sqrt(size)


def test_tiny_ranges_are_shuffled_evenly():
    orders = {}
    for seed in range(6000):
        order = tuple(permute(3, seed, 0, 0, 0, 3).tolist())
        orders[order] = orders.get(order, 0) + 1
    # Chi-square with 5 degrees of freedom exceeds 20.5 in one of a thousand fair shuffles.
    assert len(orders) == 6 and sum((count - 1000) ** 2 / 1000 for count in orders.values()) < 20.5


def test_refuses_an_index_past_the_end():
    with pytest.raises(IndexError, match="past the end"):
        permute(10, 0, 0, 0, 9, 2)
    with pytest.raises(ValueError, match="1 to 2\\^63"):
        permute(0, 0, 0, 0, 0, 1)
