"""Manifests: loaded, saved, and refused with the name of what is wrong."""

import dataclasses
import os
import sys

import pytest
import yaml

from megatron_lpr.data.corpus.manifest import Manifest, TextSource
from megatron_lpr.errors import UserError


@pytest.fixture
def manifest(make_manifest) -> Manifest:
    return make_manifest(
        ("hu", "hu", "expanded", 1.0, 50),
        ("en", "en", "original", 2.5, 60),
        ("hu2", "hu", "expanded", 1.0, 70),
    )


def test_save_and_load(manifest):
    assert Manifest.load(manifest.path) == manifest
    assert manifest.languages == ("hu", "en")
    with_source = dataclasses.replace(
        manifest.corpora[0], source=TextSource(sha256="ab", seed=3, skipped_lines=1), weight=4.0
    )
    changed = manifest.with_corpora([with_source])
    changed.save()
    loaded = Manifest.load(manifest.path)
    assert loaded == changed and loaded.digest != manifest.digest
    assert loaded.corpora[0].source.seed == 3 and loaded.corpora[1:] == manifest.corpora[1:]


def test_prefixes_are_relative_to_the_manifest(manifest, tmp_path, monkeypatch):
    assert [entry["prefix"] for entry in yaml.safe_load(open(manifest.path))["corpora"]] == [
        "hu",
        "en",
        "hu2",
    ]
    os.rename(tmp_path, tmp_path.parent / "moved")
    monkeypatch.chdir(tmp_path.parent / "moved")
    moved = Manifest.load("manifest.yaml")
    assert moved.digest == manifest.digest
    assert moved.corpora[0].prefix == "hu"
    os.rename(tmp_path.parent / "moved", tmp_path)


def test_digest_covers_what_a_run_reads(manifest):
    hu, *rest = manifest.corpora
    for field, value in (("name", "x"), ("weight", 9.0), ("tokens", 51), ("digest", "e" * 64)):
        other = dataclasses.replace(manifest, corpora=(dataclasses.replace(hu, **{field: value}), *rest))
        assert other.digest != manifest.digest
    assert dataclasses.replace(manifest, corpora=(dataclasses.replace(hu, prefix="x"), *rest)).digest == manifest.digest
    eod = dataclasses.replace(manifest, tokenizer=dataclasses.replace(manifest.tokenizer, eod_id=0))
    assert eod.digest != manifest.digest


def edit(manifest: Manifest, change) -> None:
    with open(manifest.path) as file:
        content = yaml.safe_load(file)
    change(content)
    sys.set_int_max_str_digits(6000)
    with open(manifest.path, "w") as file:
        yaml.safe_dump(content, file)
    sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)


def corpus_change(**fields):
    return lambda content: content["corpora"][1].update(fields)


@pytest.mark.parametrize(
    "change, message",
    [
        (corpus_change(langauge="en"), "corpus 'en' has the unknown key 'langauge'; did you mean 'language'"),
        (lambda content: content["corpora"][1].pop("role"), "corpus 'en' has no 'role'"),
        (lambda content: content["corpora"][1].pop("name"), "corpus 2 has no 'name'"),
        (corpus_change(role="orignal"), "unknown role 'orignal'; did you mean 'original'"),
        (corpus_change(weight=0), "corpus 'en': weight must be a positive number"),
        (corpus_change(weight="heavy"), "corpus 'en': weight must be a number"),
        (corpus_change(weight=True), "corpus 'en': weight must be a number"),
        (corpus_change(documents="one"), "corpus 'en': documents must be an integer"),
        (corpus_change(language=False), "corpus 'en': language must be a string"),
        (corpus_change(prefix="e\0n"), "corpus 'en': prefix must be text"),
        (corpus_change(digest="abc"), "corpus 'en': digest must be the SHA-256"),
        (corpus_change(tokens=61), "corpus 'en' has 61 tokens in the manifest but 60"),
        (corpus_change(documents=2), "corpus 'en' has 2 documents in the manifest but 1"),
        (corpus_change(prefix="nowhere"), "cannot open .*nowhere.idx"),
        (corpus_change(name="hu"), "two corpora are called 'hu'"),
        (corpus_change(language="hu"), "language 'hu' is expanded in corpus 'hu' and original in 'en'"),
        (corpus_change(source={"sha256": "ab"}), "corpus 'en': source has no 'seed'"),
        (lambda content: content.update(corpora=[]), "lists no corpora"),
        (lambda content: content.update(corpora=["en"]), "corpus 1 must be a mapping"),
        (lambda content: content.update(corpus=[]), "unknown key 'corpus'; did you mean 'corpora'"),
        (lambda content: content.pop("tokenizer"), "has no 'tokenizer'"),
        (lambda content: content["tokenizer"].pop("eod_id"), "tokenizer has no 'eod_id'"),
        (lambda content: content["tokenizer"].update(vocab_size=0), "vocab_size must be in .1, 2.31., not 0"),
        (lambda content: content["tokenizer"].update(vocab_size=-5), "tokenizer: vocab_size must be in"),
        (lambda content: content["tokenizer"].update(vocab_size=1 << 40), "tokenizer: vocab_size must be in"),
        (lambda content: content["tokenizer"].update(eod_id=1000), "eod_id must be a token of the 1000 there are"),
        (lambda content: content["tokenizer"].update(eod_id=-1), "eod_id must be a token of the 1000 there are"),
        (corpus_change(documents=-1), "corpus 'en': documents must be at least 1, not -1"),
        (corpus_change(tokens=0), "corpus 'en': tokens must be at least 1, not 0"),
        (corpus_change(weight=10**400), "cannot read the manifest .* is too large"),
        (corpus_change(weight="1" * 400), "corpus 'en': weight must be a positive number, not inf"),
        (corpus_change(tokens=10**5000), "cannot read the manifest .* is too large"),
        (corpus_change(source={"sha256": "ab", "seed": -1, "skipped_lines": 0}), "must not be negative"),
    ],
)
def test_mistakes_are_named(manifest, change, message):
    edit(manifest, change)
    with pytest.raises(UserError, match=message):
        Manifest.load(manifest.path)


def test_numbers_that_yaml_reads_as_strings(manifest):
    edit(manifest, corpus_change(weight="1e-3"))
    assert Manifest.load(manifest.path).corpora[1].weight == 0.001


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no manifest at"),
        ("- a", "is not a manifest"),
        ("a: [", "cannot read the manifest"),
        ("tokenizer: {}\ncorpora: []\ncorpora: []\n", "line 3: the key 'corpora' is there already, in line 2"),
        ("", "is not a"),
    ],
)
def test_no_manifest(tmp_path, content, message):
    path = tmp_path / "manifest.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        Manifest.load(str(path))


def test_corpora_without_entries_in_the_files(manifest, tmp_path):
    os.truncate(tmp_path / "en.bin", 0)
    with pytest.raises(UserError, match="en.bin is empty"):
        Manifest.load(manifest.path)
    Manifest.load(manifest.path, check_files=False)
