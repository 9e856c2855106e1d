"""Ranks that are started once for the tests of this folder: importing torch and Megatron costs seconds in each."""

import contextlib

import pytest

from megatron_lpr.testing.run_distributed import RankProcesses, run_distributed

KEPT = 4  # more ranks than this are needed once


@pytest.fixture(scope="session")
def on_ranks():
    """on_ranks(func, world_size, *args): as `run_distributed`, in processes that stay for the next test."""
    started: dict[int, RankProcesses] = {}
    with contextlib.ExitStack() as stack:

        def run(func, world_size, *args, timeout_seconds=900.0):
            if world_size > KEPT:
                return run_distributed(func, world_size, *args, timeout_seconds=timeout_seconds)
            if world_size not in started:
                started[world_size] = stack.enter_context(RankProcesses(world_size))
            try:
                return started[world_size].run(func, *args, timeout_seconds=timeout_seconds)
            except BaseException:
                del started[world_size]
                raise

        yield run
