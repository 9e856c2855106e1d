"""Which of several ranks has another copy of a weight than most."""

import pytest

from megatron_lpr.training.hooks.replicas import judge


@pytest.mark.parametrize(
    "sums, told",
    [
        ([7, 7, 8, 7], "the weight w of rank 6 is not that of ranks 0, 3, 9"),
        ([7, 8, 8, 8, 9], "the weight w of ranks 0, 12 is not that of ranks 3, 6, 9"),
        ([7, 8], "the weight w is not the same on ranks 0, 3"),
        ([7, 7, 8, 8], "the weight w is not the same on ranks 0, 3, 6, 9"),
    ],
)
def test_most_are_right(sums, told):
    assert str(judge("w", sums, [0, 3, 6, 9, 12][: len(sums)])) == told
