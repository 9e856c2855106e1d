"""These tests run where Transformer Engine is emulated (`make test-te`), and are not collected elsewhere."""

import os

import pytest
import te_on_cpu
import torch


def pytest_ignore_collect() -> bool | None:
    return None if os.environ.get(te_on_cpu.VARIABLE) else True


@pytest.fixture(autouse=True)
def same_numbers_alone_and_among_others():
    torch.manual_seed(0)
    te_on_cpu.reset_calls()
