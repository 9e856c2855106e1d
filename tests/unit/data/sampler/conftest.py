"""Samplers of corpora that have one window each: the epoch of a pick is then its corpus' number of earlier picks."""

import pytest
from manifest_entries import entry, tokenizer_record

from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler

SEQ_LENGTH = 4


@pytest.fixture
def sampler_of(write_corpus):
    prefix = write_corpus("one_window", [[5, 6, 7]])

    def make(expanded: list[float], original: list[float], mixture: dict[str, float], schedule=()) -> ReplaySampler:
        corpora = [
            entry(f"{role}{number}", role, prefix=prefix, weight=weight, tokens=3, digest=f"{number:064x}")
            for role, weights in (("expanded", expanded), ("original", original))
            for number, weight in enumerate(weights)
        ]
        manifest = Manifest(path="manifest.yaml", tokenizer=tokenizer_record(1000, eod_id=2), corpora=tuple(corpora))
        return ReplaySampler(manifest, seq_length=SEQ_LENGTH, seed=1, mixture=mixture, schedule=schedule)

    return make
