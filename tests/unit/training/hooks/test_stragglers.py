"""Which rank is slow, and when the clock stops."""

import itertools

import pytest

from megatron_lpr.training.hooks import stragglers
from megatron_lpr.training.hooks.stragglers import ComputeClock, RankPlaceOfWork, ranks_record, slow_rank


def places(*stages):
    return [RankPlaceOfWork(host=f"n{rank}", stage=stage) for rank, stage in enumerate(stages)]


def test_a_rank_is_compared_with_those_of_its_pipeline_stage():
    numbers = [(1.0, 5e9), (1.0, 7e9), (1.2, 6e9), (2.0, 1e9), (2.1, 1e9), (2.0, 1e9)]
    record = ranks_record(numbers, places(0, 0, 0, 1, 1, 1))
    assert record == {
        "compute_seconds": {"median": 1.0, "max": 1.2, "rank": 2, "host": "n2"},
        "memory_gb": {"max": 7.0, "rank": 1, "host": "n1"},
    }
    assert slow_rank(record, 100, 50) == (
        "the slowest rank is 2 (n2): 1.2 s to compute a step, the median 1 s (50 steps up to 100)"
    )


def test_ranks_that_are_nearly_alike_are_worth_no_line():
    assert slow_rank(ranks_record([(1.0, 1), (1.09, 1)], places(0, 0)), 1, 1) is None


def test_one_of_two_ranks_is_the_slower():
    record = ranks_record([(3.0, 1), (1.0, 1)], places(0, 0))
    assert record["compute_seconds"] == {"median": 1.0, "max": 3.0, "rank": 0, "host": "n0"}


@pytest.fixture
def ticks(monkeypatch):
    """Every look at the clock is a second later than the one before."""
    time = itertools.count()
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: float(next(time)))
    return time


def test_the_clock_stops_before_the_sum_and_what_waits_in_it_does_not_count(ticks):
    clock = ComputeClock()
    wait = clock.before(lambda seconds: [next(ticks) for _ in range(seconds)] and "summed")
    for waits in (10, 100):
        clock.begin()  # 1 s to the call
        assert wait(waits) == "summed"
        clock.end()
    assert clock.take() == (1.0, 2) and clock.take() == (0.0, 0)


def test_a_step_that_is_made_by_hand_has_no_beginning(ticks):
    clock = ComputeClock()
    clock.before(lambda: None)()
    clock.end()
    assert clock.take() == (0.0, 0)
