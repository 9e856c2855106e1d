"""Corpora against the digests of their manifest: all of them (verify-data), and some blocks at every start."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from preprocessing import preprocess

from megatron_lpr.cli import main
from megatron_lpr.data.corpus import spot_check
from megatron_lpr.data.corpus.manifest import Manifest
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


def test_a_manifest_without_checksums_is_refused(manifest):
    text = open(manifest.path).read()
    for key in ("index_digest", "spot_digests", "parse_special_tokens"):
        content = yaml.safe_load(text)
        for owner in (content["corpora"][1], content["tokenizer"]):
            owner.pop(key, None)
        Path(manifest.path).write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=f"has no '{key}'"):
            Manifest.load(manifest.path)
    for suffix in ("bin", "idx", "lang"):  # somebody has removed one
        content = yaml.safe_load(text)
        del content["corpora"][1]["spot_digests"][suffix]
        Path(manifest.path).write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=f"corpus 'web': spot_digests has no '{suffix}'"):
            Manifest.load(manifest.path)


def test_an_existing_corpus_that_changed_is_told(manifest, hf_tokenizer, tmp_path, capsys):
    first, second = (f"{os.path.dirname(manifest.path)}/{name}" for name in ("en", "web"))
    settings = {"tokenizer": hf_tokenizer, "output": str(tmp_path / "taken")}
    (tmp_path / "taken").mkdir()
    for prefix, told in ((first, False), (first, False), (second, True)):
        for suffix in ("bin", "idx"):
            shutil.copy(f"{prefix}.{suffix}", tmp_path / f"old.{suffix}")
        preprocess([SourceConfig(name="x", prefix=str(tmp_path / "old"), language="en", role="original")], **settings)
        assert ("holds other tokens than its entry" in capsys.readouterr().err) == told


def test_preprocess_does_not_call_other_bytes_unchanged(manifest, write_text, hf_tokenizer, capsys):
    folder = os.path.dirname(manifest.path)
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

    sampler("a").check_state(sampler("a").state(8))
    with pytest.raises(UserError, match="index_digest of corpus 'hu' was a, is b"):
        sampler("b").check_state(sampler("a").state(8))
