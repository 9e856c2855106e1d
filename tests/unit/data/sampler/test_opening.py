"""Files are opened when a sample of them is read: a rank does not open thousands of corpora before its first step."""

import dataclasses
import os
import time

import numpy as np
import pytest

from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import ReplayConfig

S = 16
MIXTURE = {"expanded": 0.5, "original": 0.5}


@pytest.fixture
def manifest(make_manifest) -> Manifest:
    return make_manifest(("hu", "hu", "expanded", 1, 200), ("en", "en", "original", 1, 200))


def sampler_of(manifest: Manifest, **settings) -> ReplaySampler:
    return ReplaySampler(manifest, **({"seq_length": S, "seed": 1, "mixture": MIXTURE} | settings))


def away(manifest: Manifest) -> None:
    for corpus in manifest.corpora:
        for suffix in (".idx", ".bin"):
            os.rename(corpus.prefix + suffix, corpus.prefix + suffix + ".away")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"windows": "document"},
        {"replay": ReplayConfig(tokens={"original": 0.3})},
        {"document_ids": True},
    ],
    ids=str,
)
def test_sizes_and_order_are_known_without_the_files(manifest, settings):
    expected = sampler_of(manifest, **settings)
    expected.fill(0, 4)
    away(manifest)
    sampler = sampler_of(manifest, **settings)
    for number in range(2):
        assert sampler.num_windows(number) == expected.num_windows(number)
        assert sampler.num_tokens(number) == expected.num_tokens(number)
    np.testing.assert_array_equal(sampler.picks(0, 50), expected.picks(0, 50))
    with pytest.raises(UserError, match=r"cannot open .*(hu|en)\.idx"):
        sampler.fill(0, 2)


def test_a_corpus_that_came_back_is_read(manifest):
    """A file system that fails for a moment need not end what asks again."""
    expected = sampler_of(manifest).fill(0, 8)
    sampler = sampler_of(manifest)
    away(manifest)
    with pytest.raises(UserError, match="cannot open"):
        sampler.fill(0, 8)
    for corpus in manifest.corpora:
        for suffix in (".idx", ".bin"):
            os.rename(corpus.prefix + suffix + ".away", corpus.prefix + suffix)
    np.testing.assert_array_equal(sampler.fill(0, 8).tokens_BS, expected.tokens_BS)


@pytest.mark.parametrize("field", ["tokens", "documents"])
def test_other_sizes_than_the_manifest_says_are_refused(manifest, field):
    hu, en = manifest.corpora
    changed = dataclasses.replace(manifest, corpora=(dataclasses.replace(hu, **{field: getattr(hu, field) + 1}), en))
    sampler = sampler_of(changed, mixture={"expanded": 1})
    with pytest.raises(UserError, match=r"hu\.bin has 200 tokens in \d+ documents, in the manifest it has .* again"):
        sampler.fill(0, 1)


def test_a_corpus_made_again_under_a_run_is_refused(manifest):
    """Ranks that open it later would read another corpus than those that had opened it before."""
    sampler = sampler_of(manifest, mixture={"expanded": 1})
    later = time.time() + 3600
    os.utime(f"{manifest.corpora[0].prefix}.bin", (later, later))
    with pytest.raises(UserError, match=r"hu\.bin was written after this run had read its manifest: start"):
        sampler.fill(0, 1)
