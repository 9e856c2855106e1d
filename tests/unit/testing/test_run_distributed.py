"""run_distributed: results, environment, failures and time."""

import os
import time

import pytest
from rank_functions import describe_rank, fail_on, hang_on, vanish_on

from megatron_lpr.testing.run_distributed import RankProcesses, free_port, run_distributed


def test_results_come_in_the_order_of_ranks():
    results = run_distributed(describe_rank, 3, "x")
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert len({result["process"] for result in results} | {os.getpid()}) == 4
    for result in results:
        assert result["argument"] == "x" and result["world_size"] == 3 and result["threads"] == "1"
    assert len({result["port"] for result in results}) == 1


def test_first_failing_rank_is_shown_and_the_others_are_killed():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed:(.|\n)*fail_on(.|\n)*ValueError: on purpose"):
        run_distributed(fail_on, 2, 1)  # rank 0 would sleep for minutes
    assert time.monotonic() - start < 200


def test_dead_rank_is_shown():
    with pytest.raises(RuntimeError, match="rank 0 of 1 died: 3"):
        run_distributed(vanish_on, 1, 0)


def test_time_limit_names_the_ranks_that_are_missing():
    with RankProcesses() as processes:
        processes.run(describe_rank, 2, "x")  # they are there, however long that has taken
        with pytest.raises(RuntimeError, match=r"out of time: no result from ranks \[1\] of 2"):
            processes.run(hang_on, 2, 1, timeout_seconds=5)


def test_processes_serve_calls_of_more_and_of_fewer_ranks():
    with RankProcesses() as processes:
        two, three, again = (processes.run(describe_rank, ranks, "x") for ranks in (2, 3, 2))
        assert [result["process"] for result in three[:2]] == [result["process"] for result in two]
        assert [result["process"] for result in again] == [result["process"] for result in two]
        assert [result["world_size"] for result in again] == [2, 2]
        with pytest.raises(RuntimeError, match="rank 1 of 2 died: 3"):
            processes.run(vanish_on, 2, 1)
        fresh = processes.run(describe_rank, 1, "x")
        assert fresh[0]["process"] not in {result["process"] for result in three}


def test_no_port_is_given_twice():
    """Ranks that have been told of one do not listen at it for seconds."""
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == 500 and 20_000 <= min(ports) <= max(ports) < 32_000
