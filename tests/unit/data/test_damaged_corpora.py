"""Corpora that are damaged, or cut short while they are read: samples, or a sentence that names the file."""

import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from manifest_entries import entry, tokenizer_record

from megatron_lpr._replay_sampler import LanguageRuns
from megatron_lpr.data.corpus.indexed import IndexedCorpus, LanguageRunsWriter
from megatron_lpr.data.corpus.manifest import Corpus, Manifest
from megatron_lpr.data.preprocess.existing import existing_corpus
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import ReplayConfig

LENGTHS = [3, 1, 8, 4, 2, 6]
LANGUAGES = {"hu": "expanded", "en": "expanded"}
SETTINGS = [
    {"windows": windows, "replay": replay, "document_ids": True}
    for windows in ("packed", "fixed", "document")
    for replay in (None, {"documents": {"expanded": 2}}, {"tokens": {"expanded": 0.2}})
]


@pytest.fixture
def corpus(tmp_path, write_corpus) -> Corpus:
    """24 tokens in 6 documents, 2 languages."""
    prefix = write_corpus("toy", [list(range(3, 3 + length)) for length in LENGTHS])
    runs = LanguageRunsWriter(prefix)
    runs.add(np.repeat([0, 1, 0, 1], 6))
    runs.close()
    languages = {"language": "hu", "languages": LANGUAGES, "language_digest": "2" * 64}
    return entry("toy", prefix=prefix, documents=6, tokens=24, digest="1" * 64, **languages)


def manifest_of(corpus: Corpus, vocab_size: int = 1000) -> Manifest:
    return Manifest(path="manifest.yaml", tokenizer=tokenizer_record(vocab_size, eod_id=2), corpora=(corpus,))


def sampler_of(
    corpus: Corpus, *, windows: str, replay: dict | None, document_ids: bool, seed: int = 1, **settings
) -> ReplaySampler:
    replay = ReplayConfig(**replay) if replay else None
    return ReplaySampler(
        manifest_of(corpus, **settings),
        seq_length=4,
        seed=seed,
        mixture={"expanded": 1},
        windows=windows,
        replay=replay,
        document_ids=document_ids,
    )


def use_sampler(corpus: Corpus, settings: dict) -> None:
    sampler = sampler_of(corpus, **settings)
    sampler.fill(0, 12)
    sampler.count(0, 12)
    for k in range(12):
        pick = sampler.pick(k)
        sampler.spans(pick)
        sampler.documents(pick)


def use_readers(corpus: Corpus) -> None:
    files = IndexedCorpus(corpus.prefix)
    LanguageRuns(corpus.prefix, num_tokens=files.num_tokens, num_languages=2).check()
    for document in range(len(files)):
        files.document(document)
    files.boundaries(0, len(files))


def _fails_only_with(suffix: str, work, *arguments) -> bool:
    try:
        work(*arguments)
    except UserError as error:
        assert f"toy.{suffix}" in str(error) or f"toy.{'bin' if suffix == 'idx' else 'idx'}" in str(error), error
        return True
    return False


@pytest.mark.parametrize("suffix", ["idx", "bin", "lang"])
def test_every_damage_is_read_or_refused_by_name(corpus, suffix):
    """Numbers of every kind at every place of the body; what is raised is a UserError and nothing else."""
    path = f"{corpus.prefix}.{suffix}"
    with open(path, "rb") as file:
        whole = file.read()
    refused = 0
    for place in range(0, len(whole) - 1, 2 if suffix == "bin" else 4):
        for number in (0, 5, 46, (1 << 63) - 2, (1 << 64) - 1):
            data = struct.pack("<Q", number)[: len(whole) - place]
            with open(path, "wb") as file:
                file.write(whole[:place] + data + whole[place + len(data) :])
            refused += sum([_fails_only_with(suffix, use_sampler, corpus, settings) for settings in SETTINGS])
            refused += _fails_only_with(suffix, use_readers, corpus)
    assert refused > 20


def test_a_subset_of_documents_that_end_before_they_begin(corpus):
    """Offsets that go back: the subset's size wrapped around, and a permutation of 2^63 windows was asked for."""
    offsets = 34 + 4 * len(LENGTHS)
    with open(f"{corpus.prefix}.idx", "r+b") as file:
        for document in (1, 3, 5):
            file.seek(offsets + 8 * document)
            file.write(struct.pack("<q", 2 * (23 - document) if document < 5 else 36))
    replays = ({"documents": {"expanded": 1}}, {"documents": {"expanded": 3}}, {"tokens": {"expanded": 0.2}})
    settings = [{"windows": w, "replay": r, "document_ids": True} for w in ("packed", "document") for r in replays]
    refused = [
        _fails_only_with("idx", use_sampler, corpus, {**its, "seed": seed}) for seed in range(12) for its in settings
    ]
    assert sum(refused) > len(refused) / 3


def test_a_part_of_tokens_that_begins_long_before_the_token_it_was_searched_with(corpus):
    """Its last document came before its first, and a permutation of 2^64 - 2 documents was asked for."""
    with open(f"{corpus.prefix}.idx", "r+b") as file:
        file.seek(34 + 4 * len(LENGTHS) + 8 * 4)
        file.write(struct.pack("<q", 2))
    settings = {"windows": "document", "replay": {"tokens": {"expanded": 0.2}}, "document_ids": True}
    refused = [_fails_only_with("idx", use_sampler, corpus, {**settings, "seed": seed}) for seed in range(12)]
    assert 0 < sum(refused) < len(refused)


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_a_token_outside_the_vocabulary_is_refused_where_it_is_read(write_corpus, vocab_size):
    prefix = write_corpus("toy", [[1, 2, 3, 4, 5, 6, 7]], vocab_size)
    corpus = entry("t", prefix=prefix, language="hu", tokens=7, digest="1" * 64)
    settings = {"windows": "fixed", "replay": None, "document_ids": False}
    sampler_of(corpus, vocab_size=8, **settings).fill(0, 2)
    with pytest.raises(UserError, match="toy.bin is corrupt, .*: token 6 is 7, the vocabulary has 7"):
        sampler_of(corpus, vocab_size=7, **settings).fill(0, 2)
    if vocab_size == 70_000:
        with open(f"{prefix}.bin", "r+b") as file:
            file.write(struct.pack("<i", -5))
        with pytest.raises(UserError, match="token 0 is -5"):
            sampler_of(corpus, vocab_size=70_000, **settings).fill(0, 2)


READ_ON = """
import os, sys
sys.path[:0] = sys.argv[4].split(os.pathsep)
from dataclasses import replace
from megatron_lpr.data.preprocess.existing import existing_corpus
from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr._replay_sampler import LanguageRuns
from megatron_lpr.errors import UserError
from test_damaged_corpora import entry, sampler_of, LANGUAGES

prefix, suffix, how, _ = sys.argv[1:]
corpus = entry("toy", prefix=prefix, language="hu", documents=1 << 14, tokens=1 << 16, languages=LANGUAGES,
               language_digest="2" * 64)
try:
    if how == "python":
        files = IndexedCorpus(prefix)
        runs = LanguageRuns(prefix, num_tokens=files.num_tokens, num_languages=2)
        os.truncate(f"{prefix}.{suffix}", 64)
        runs.check()
        for document in range(len(files)):
            files.document(document)
    sampler = sampler_of(corpus, windows="packed", replay=None, document_ids=True)
    if how == "fill":
        sampler.fill(0, 1)
        os.truncate(f"{prefix}.{suffix}", 64)
        sampler.fill(0, 1 << 14)
    if how == "read ahead":
        batches = sampler.batches(0, 4, 4, read_ahead=2)
        next(batches)
        os.truncate(f"{prefix}.{suffix}", 64)
        for number in range(1 << 12):
            next(batches)
except UserError as error:
    sys.exit(f"{error}")
"""


@pytest.mark.parametrize("how", ["fill", "read ahead", "python"])
@pytest.mark.parametrize("suffix", ["bin", "idx", "lang"])
def test_a_file_that_is_cut_short_while_it_is_read(tmp_path, write_corpus, suffix, how):
    prefix = write_corpus("toy", [[3, 4, 5, 6]] * (1 << 14))
    runs = LanguageRunsWriter(prefix)
    runs.add(np.arange(1 << 16) // 8 % 2)
    runs.close()
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READ_ON), prefix, suffix, how, path],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1, child.stderr[-500:]  # neither SIGBUS nor a traceback
    assert f"toy.{suffix} was cut short while it was read" in child.stderr and "Traceback" not in child.stderr


def test_an_existing_corpus_whose_files_shrink(corpus, monkeypatch):
    """preprocess reads all of it; the error names the file."""
    from megatron_lpr.data.preprocess import existing
    from megatron_lpr.recipe.text_settings import SourceConfig

    source = SourceConfig(name="toy", prefix=corpus.prefix, language="hu", role="expanded")
    check = existing._check_documents

    def cut_first(*arguments):
        os.truncate(f"{corpus.prefix}.bin", 4)
        return check(*arguments)

    monkeypatch.setattr(existing, "_check_documents", cut_first)
    with pytest.raises(UserError, match="toy.bin was cut short"):
        existing_corpus(source, manifest_of(corpus).tokenizer)
