"""Ranks that are started once for the tests of this folder: importing torch and Megatron costs seconds in each."""

import functools

import pytest

from megatron_lpr.testing.run_distributed import RankProcesses


@pytest.fixture(scope="session")
def on_ranks():
    """on_ranks(func, world_size, *args): as `run_distributed`, in processes that stay for the next test."""
    with RankProcesses() as processes:
        yield functools.partial(processes.run, timeout_seconds=900.0)
