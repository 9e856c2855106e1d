"""Corpora against the digests of their manifest: all of them (verify-data), and some blocks at every start."""

import dataclasses
import os
import shutil
import time

import numpy as np
import pytest
from preprocessing import preprocess

from megatron_lpr.cli import main
from megatron_lpr.data.corpus import spot_check
from megatron_lpr.data.corpus.manifest import Corpus, Manifest
from megatron_lpr.data.corpus.verify_data import record
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import ReplayConfig
from megatron_lpr.recipe.text_settings import SourceConfig


def flip(path: str, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def sources(write_text) -> list[SourceConfig]:
    text = [f"the quick brown fox {n}" for n in range(50)]
    mixed = write_text(
        "mixed.jsonl", [b'{"text": "%d fox", "lang": "%s"}' % (n, b"de" if n % 2 else b"hu") for n in range(50)]
    )
    return [
        SourceConfig(name="en", language="en", role="original", files=(write_text("en.jsonl", text),)),
        SourceConfig(
            name="web",
            language="hu",
            role="expanded",
            files=(mixed,),
            languages={"hu": "expanded", "de": "expanded"},
            language_field="lang",
        ),
    ]


@pytest.fixture
def manifest(tmp_path, write_text, hf_tokenizer) -> Manifest:
    preprocess(sources(write_text), tokenizer=hf_tokenizer, output=str(tmp_path / "out"), workers=1)
    return Manifest.load(str(tmp_path / "out" / "manifest.yaml"))


def test_what_preprocess_wrote_passes(manifest, capsys, tmp_path):
    assert main(["verify-data", manifest.path]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.rsplit("/", 1)[1] for line in out] == [
        "en.bin: ok",
        "en.idx: ok",
        "web.bin: ok",
        "web.idx: ok",
        "web.lang: ok",
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{{name: x, preprocess: {{output: {tmp_path}/out, tokenizer: t}}}}")
    assert main(["verify-data", str(recipe), "--workers", "1"]) == 0


@pytest.mark.parametrize("files", [["en.bin"], ["en.idx"], ["web.lang"], ["en.idx", "web.bin", "web.lang"]])
def test_every_file_with_another_byte_is_named(manifest, files, capsys):
    for file in files:
        path = os.path.join(os.path.dirname(manifest.path), file)
        flip(path, os.path.getsize(path) // 2)
    assert main(["verify-data", manifest.path]) == 2
    captured = capsys.readouterr()
    wrong = [line.split(":")[0] for line in captured.out.splitlines() if not line.endswith(": ok")]
    assert [os.path.basename(path) for path in wrong] == files
    assert all(path in captured.err.splitlines()[-1] for path in wrong)
    with pytest.raises(UserError, match=f"{files[0]} does not hold what was written"):
        spot_check.check_at_start(Manifest.load(manifest.path, check_files=False), 0)


@pytest.mark.parametrize("suffix", ["bin", "idx", "lang"])
@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 10), lambda path: os.truncate(path, 0)])
def test_missing_and_short_files_are_named(manifest, suffix, damage, capsys):
    path = os.path.join(os.path.dirname(manifest.path), f"web.{suffix}")
    damage(path)
    assert main(["verify-data", manifest.path]) == 2
    assert f"web.{suffix}" in capsys.readouterr().err.splitlines()[-1]


def made_old(manifest):
    """As a version without checksums wrote it."""
    fields = {"index_digest": None, "spot_digests": None}
    old = dataclasses.replace(manifest, corpora=tuple(dataclasses.replace(c, **fields) for c in manifest.corpora))
    old.save()
    return old


def test_an_old_manifest_works_and_can_be_brought_up_to_date(manifest, capsys):
    made_old(manifest)
    assert "spot_digests" not in open(manifest.path).read()
    old = Manifest.load(manifest.path)
    spot_check.check_at_start(old, 0)
    [note] = spot_check.unrecorded(old)
    assert "en, web" in note and "verify-data" in note
    assert main(["verify-data", manifest.path]) == 0 and "--record" in capsys.readouterr().out
    assert main(["verify-data", manifest.path, "--record"]) == 0
    assert Manifest.load(manifest.path) == manifest and not spot_check.unrecorded(manifest)
    first, *others = manifest.corpora
    without = dataclasses.replace(first, spot_digests={"idx": first.spot_digests["idx"]})  # somebody has removed one
    edited = dataclasses.replace(manifest, corpora=(without, *others))
    [note] = spot_check.unrecorded(edited)
    assert f"whether the files of {first.name} have changed is not checked" in note
    edited.save()
    assert main(["verify-data", manifest.path, "--record"]) == 0 and Manifest.load(manifest.path) == manifest


def test_recording_keeps_what_another_process_has_entered_meanwhile(manifest):
    old = made_old(manifest)
    newer = dataclasses.replace(manifest.corpora[0], weight=7.0)
    old.with_corpora([newer]).save()
    assert record(old)
    assert Manifest.load(manifest.path).corpora == (newer, *manifest.corpora[1:])


def test_recording_compares_each_corpus_once(manifest, monkeypatch):
    old, compared, equal = made_old(manifest), [], Corpus.__eq__
    monkeypatch.setattr(Corpus, "__eq__", lambda self, other: compared.append(self.name) or equal(self, other))
    assert record(old) and len(compared) == len(old.corpora)


def test_an_existing_corpus_that_changed_is_told(manifest, hf_tokenizer, tmp_path, capsys):
    first, second = (f"{os.path.dirname(manifest.path)}/{name}" for name in ("en", "web"))
    settings = {"tokenizer": hf_tokenizer, "output": str(tmp_path / "taken")}
    (tmp_path / "taken").mkdir()
    for prefix, told in ((first, False), (first, False), (second, True)):
        for suffix in ("bin", "idx"):
            shutil.copy(f"{prefix}.{suffix}", tmp_path / f"old.{suffix}")
        preprocess([SourceConfig(name="x", prefix=str(tmp_path / "old"), language="en", role="original")], **settings)
        assert ("holds other tokens than its entry" in capsys.readouterr().err) == told


@pytest.mark.parametrize("old", [False, True])
def test_preprocess_does_not_call_other_bytes_unchanged(manifest, write_text, hf_tokenizer, capsys, old):
    folder = os.path.dirname(manifest.path)
    if old:
        made_old(manifest)
    before = open(f"{folder}/en.bin", "rb").read()
    flip(f"{folder}/en.bin", 20)
    preprocess(sources(write_text), tokenizer=hf_tokenizer, output=folder, workers=1)
    err = capsys.readouterr().err
    assert "en: made again, because" in err and "web: unchanged" in err
    assert open(f"{folder}/en.bin", "rb").read() == before
    assert Manifest.load(manifest.path) == manifest


def test_a_spot_check_of_a_large_file(tmp_path):
    """Milliseconds; it sees what is longer than 1/128 of a file, its first and its last block, and little else."""
    path = str(tmp_path / "large")
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    key = "5" * 64
    start = time.process_time()
    recorded = spot_check.spot_digest(path, key)
    assert time.process_time() - start < 1
    assert spot_check.spot_digest(path, key) == recorded
    for place in (0, (1 << 40) - 1):
        flip(path, place)
        assert spot_check.spot_digest(path, key) != recorded
        flip(path, place)
    places = list(spot_check._places(1 << 28, key))
    assert len(places) == 258 and max(np.diff(places)) <= (1 << 28) / 128
    assert places != list(spot_check._places(1 << 28, "6" * 64))


def test_resuming_compares_the_index(make_manifest):
    manifest = make_manifest(("hu", "hu", "expanded", 1.0, 200))

    def sampler(index_digest):
        corpora = tuple(dataclasses.replace(c, index_digest=index_digest) for c in manifest.corpora)
        return ReplaySampler(
            dataclasses.replace(manifest, corpora=corpora),
            seq_length=8,
            seed=1,
            mixture={"expanded": 1},
            replay=ReplayConfig(),
        )

    for saved, now in (("a", "a"), (None, "a"), ("a", None)):
        sampler(now).check_state(sampler(saved).state(8))
    with pytest.raises(UserError, match="index_digest of corpus 'hu' was a, is b"):
        sampler("b").check_state(sampler("a").state(8))
