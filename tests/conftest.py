"""Fixtures of all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; tiny tensors gain nothing from threads

import pytest

from megatron_lpr.testing.toy_models import write_toy_model


@pytest.fixture
def megatron():
    """Megatron in this process, a run of one rank. Commands (cli.main) enter and leave by themselves instead."""
    from megatron_lpr.platform import megatron

    with megatron():
        yield


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    """Folder of a random dense model, fp32, untied."""
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="session")
def toy_tied(tmp_path_factory):
    """The same size with tied embeddings."""
    return write_toy_model(tmp_path_factory.mktemp("toy") / "tied", tie_word_embeddings=True)
