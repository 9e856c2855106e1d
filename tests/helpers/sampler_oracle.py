"""The replay sampler once more: slow, in unbounded integers and fractions, by bookkeeping instead of closed forms."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import floor

from hypothesis import strategies as st

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15

# Half of 1/1 + 1/1 + 1/2 + 1/3 + 1/5 + ... over the Fibonacci numbers, rounded up (proof in csrc/mixture.h): how far a
# corpus' count may be from its share.
BOUND = Fraction(168, 100)
weights = st.lists(
    st.one_of(st.integers(1, 9), st.floats(0.01, 10), st.sampled_from([0.001, 0.999, 1 / 3])),
    min_size=1,
    max_size=6,
)
shares = st.one_of(st.sampled_from([1e-6, 1 - 1e-6, 0.5, 1 / 3, 0.999]), st.floats(1e-6, 1 - 1e-6))


def mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def key_hash(seed: int, stream: int, epoch: int) -> int:
    state = 0
    for word in (seed, stream, epoch):
        state = mix((state + word + GOLDEN) & MASK)
    return state


def permuted(size: int, seed: int, stream: int, epoch: int, index: int) -> int:
    """The image of `index` under the keyed permutation of range(size)."""
    columns = max(16, int(math.sqrt(size)))
    rows = max(16, -(-size // columns))
    state = key_hash(seed, stream, epoch)
    round_keys = [mix((state + round_ * GOLDEN) & MASK) for round_ in range(1, 9)]

    def shift(word: int, key: int, bound: int) -> int:
        word = ((word ^ key) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 32)) * 0x94D049BB133111EB) & MASK
        return word * bound >> 64

    while True:
        row, column = divmod(index, columns)
        for row_key, column_key in zip(round_keys[::2], round_keys[1::2], strict=True):
            row = (row + shift(column, row_key, rows)) % rows
            column = (column + shift(row, column_key, columns)) % columns
        index = row * columns + column
        if index < size:
            return index


def window_positions(tokens: int, seq_length: int, window: int, shift: int) -> list[int]:
    """Positions of the corpus that a packed window holds, from a walk over the epoch."""
    count = tokens - 1
    walk = [(shift + i) % count for i in range(count)]
    return walk[window * seq_length : (window + 1) * seq_length]


def epoch_shift(seq_length: int, seed: int, stream: int, epoch: int) -> int:
    """Where an epoch's first window begins."""
    return mix(key_hash(seed, stream, epoch) ^ GOLDEN) * seq_length >> 64 if epoch else 0


def place_of_subset(seed: int, stream: int, places: int) -> int:
    """Which document, or token, the part of a corpus that is read begins at."""
    return mix((key_hash(seed, stream, 0) + 1) & MASK) * places >> 64


def order_in_role(weights: Sequence[int], length: int) -> list[int]:
    """The two lightest subtrees are joined until one is left; it hands its samples on in the proportion of the two."""
    subtrees = [(weight, number, None) for number, weight in enumerate(weights)]
    for number in range(len(weights), 2 * len(weights) - 1):
        subtrees.sort(key=lambda subtree: subtree[:2])
        light, heavy, *rest = subtrees
        subtrees = [*rest, (light[0] + heavy[0], number, (light, heavy))]
    given: Counter[int] = Counter()
    order = []
    for _ in range(length):
        weight, number, children = subtrees[0]
        while children:
            n, share = given[number], Fraction(children[0][0], weight)
            given[number] += 1
            to_light = floor((n + 1) * share + Fraction(1, 2)) > floor(n * share + Fraction(1, 2))
            weight, number, children = children[0 if to_light else 1]
        order.append(number)
    return order


def draws(expanded: Sequence[int], original: Sequence[int], share: Fraction, length: int) -> list[tuple[int, int]]:
    """(corpus, number of its earlier samples) of the first samples of a mixture; expanded corpora come first."""
    orders = [order_in_role(expanded, length), order_in_role(original, length)]
    used = [0, 0]
    counts = [0] * (len(expanded) + len(original))
    result = []
    for k in range(length):
        is_expanded = floor((k + 1) * share + Fraction(1, 2)) > floor(k * share + Fraction(1, 2))
        role = 0 if is_expanded else 1
        corpus = orders[role][used[role]] + (0 if is_expanded else len(expanded))
        used[role] += 1
        result.append((corpus, counts[corpus]))
        counts[corpus] += 1
    return result
