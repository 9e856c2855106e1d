"""Corpora that mix languages: the tags of every token, from a sidecar of language runs."""

import dataclasses
import struct

import numpy as np
import pytest

from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError

S = 16
MIXTURE = {"expanded": 0.5, "original": 0.5}


def write_runs(prefix: str, starts: list[int], languages: list[int]) -> None:
    with open(f"{prefix}.lang", "wb") as file:
        file.write(b"LPRLANG1" + struct.pack("<Q", len(starts)))
        file.write(np.array(starts, np.uint64).tobytes() + np.array(languages, np.uint16).tobytes())


@pytest.fixture
def manifest(make_manifest) -> Manifest:
    """hu0 mixes Hungarian, English and Turkish; its entry lists English first."""
    manifest = make_manifest(("en0", "en", "original", 1, 300), ("hu0", "hu", "expanded", 1, 400))
    starts = [0, 3, 4, 20, 50, 51, 200, 390, 399]
    write_runs(manifest.corpora[1].prefix, starts, [1, 0, 2, 1, 0, 1, 2, 0, 1])
    languages = {"en": "original", "hu": "expanded", "tr": "expanded"}
    hu0 = manifest.corpora[1]
    spots = {**hu0.spot_digests, "lang": "b" * 64}
    mixed = dataclasses.replace(hu0, languages=languages, language_digest="a" * 64, spot_digests=spots)
    manifest = manifest.with_corpora([mixed])
    manifest.save()
    return manifest


def token_tags(manifest: Manifest) -> np.ndarray:
    """Of each token of hu0, from the runs read in NumPy: en is language 1 (original), hu 2, tr 3 (expanded)."""
    data = open(f"{manifest.corpora[1].prefix}.lang", "rb").read()
    (runs,) = struct.unpack_from("<Q", data, 8)
    starts = np.frombuffer(data, np.uint64, runs, 16).astype(int)
    languages = np.frombuffer(data, np.uint16, runs, 16 + 8 * runs)
    return np.repeat(np.array([1, -2, -3])[languages], np.diff([*starts, 400]))


def test_the_manifest_knows_every_language(manifest):
    assert manifest.languages == ("en", "hu", "tr")
    assert manifest.language_roles == {"en": "original", "hu": "expanded", "tr": "expanded"}
    loaded = Manifest.load(manifest.path)
    assert loaded == manifest and loaded.digest == manifest.digest
    other = dataclasses.replace(manifest.corpora[1], language_digest="b" * 64)
    assert manifest.with_corpora([other]).digest != manifest.digest


@pytest.mark.parametrize("windows", ["packed", "fixed", "document"])
def test_every_token_has_the_tag_of_its_run(manifest, windows):
    sampler = ReplaySampler(manifest, seq_length=S, seed=4, mixture=MIXTURE, windows=windows)
    tags, batch, seen = token_tags(manifest), sampler.fill(0, 200), 0
    for row in range(200):
        pick = sampler.pick(row)
        if pick.corpus == 0:
            assert set(batch.tags_BS[row].tolist()) <= {1, 0}
            continue
        positions = np.concatenate([np.arange(first, first + count) for first, count in sampler.spans(pick)])
        np.testing.assert_array_equal(batch.tags_BS[row, : len(positions)], tags[positions])
        assert (batch.tags_BS[row, len(positions) :] == 0).all()
        seen += len(positions)
    assert seen > 1000 or windows == "document"


@pytest.mark.parametrize("windows", ["packed", "fixed", "document"])
@pytest.mark.parametrize("first, count", [(0, 1), (0, 300), (77, 19), (10**9, 150)])
def test_counts_per_language_are_those_of_the_tags(manifest, windows, first, count):
    sampler = ReplaySampler(manifest, seq_length=S, seed=4, mixture=MIXTURE, windows=windows)
    batch, counts = sampler.fill(first, count), sampler.count(first, count)
    expected = {"en": (batch.tags_BS == 1).sum(), "hu": (batch.tags_BS == -2).sum(), "tr": (batch.tags_BS == -3).sum()}
    assert counts.tokens_per_language == expected
    assert counts.tokens == (batch.tags_BS != 0).sum() and counts.original_tokens == (batch.tags_BS > 0).sum()


def test_state_names_a_changed_sidecar(manifest):
    sampler = ReplaySampler(manifest, seq_length=S, seed=4, mixture=MIXTURE)
    other = manifest.with_corpora([dataclasses.replace(manifest.corpora[1], language_digest="b" * 64)])
    with pytest.raises(UserError, match="language_digest of corpus 'hu0' was aaa"):
        ReplaySampler(other, seq_length=S, seed=4, mixture=MIXTURE).check_state(sampler.state(5))


def test_a_language_has_one_role(manifest):
    mixed = dataclasses.replace(manifest.corpora[1], languages={"en": "expanded", "hu": "expanded"})
    with pytest.raises(UserError, match="language 'en' is original in corpus 'en0' and expanded in 'hu0'"):
        manifest.with_corpora([mixed])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"x" + data[1:], "bad magic"),
        (lambda data: data[:-1], "wrong size"),
        (lambda data: data[:10], "bad magic"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 62) + data[16:], "wrong size"),
        (lambda data: data[:8] + struct.pack("<Q", 0), "wrong size"),
        (lambda data: data[:16] + struct.pack("<Q", 1) + data[24:], "do not cover"),
        (lambda data: data[:80] + struct.pack("<Q", 400) + data[88:], "do not cover"),
        (lambda data: data[:32] + struct.pack("<Q", 3) + data[40:], "corrupt at run"),
        (lambda data: data[:88] + struct.pack("<H", 9) + data[90:], "corrupt at run"),
    ],
)
def test_corrupt_sidecars_are_named(manifest, change, message):
    path = f"{manifest.corpora[1].prefix}.lang"
    data = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(change(data))
    with pytest.raises(UserError, match=f"hu0.lang .*{message}"):
        ReplaySampler(manifest, seq_length=S, seed=4, mixture=MIXTURE).fill(0, 100)
