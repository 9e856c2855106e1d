"""Samplers of corpora that have one window each: the epoch of a pick is then its corpus' number of earlier picks."""

import pytest

from megatron_lpr.data.corpus.manifest import Corpus, Manifest, TokenizerRecord
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler

SEQ_LENGTH = 4


@pytest.fixture
def sampler_of(write_corpus):
    prefix = write_corpus("one_window", [[5, 6, 7]])

    def make(expanded: list[float], original: list[float], mixture: dict[str, float], schedule=()) -> ReplaySampler:
        corpora = [
            Corpus(
                name=f"{role}{number}",
                prefix=prefix,
                language=f"{role}{number}",
                role=role,
                weight=weight,
                documents=1,
                tokens=3,
                digest=f"{number:064x}",
            )
            for role, weights in (("expanded", expanded), ("original", original))
            for number, weight in enumerate(weights)
        ]
        tokenizer = TokenizerRecord(name="toy", vocab_size=1000, sha256="0" * 64, eod_id=2)
        manifest = Manifest(path="manifest.yaml", tokenizer=tokenizer, corpora=tuple(corpora))
        return ReplaySampler(manifest, seq_length=SEQ_LENGTH, seed=1, mixture=mixture, schedule=schedule)

    return make
