"""Small corpora in many parts."""

import pytest

from megatron_lpr.data.preprocess import make_corpus


@pytest.fixture
def small_blocks(monkeypatch):
    for constant in ("BLOCK_BYTES", "_LEAST_BLOCK_BYTES", "BUCKET_BYTES"):
        monkeypatch.setattr(make_corpus, constant, 2048)
