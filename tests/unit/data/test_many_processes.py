"""Several processes preprocess into one folder at once: no entry is lost, contradictions end in a sentence."""

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
from preprocessing import preprocess

from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.preprocess import entries as entries_module
from megatron_lpr.data.preprocess import preprocess as module
from megatron_lpr.data.preprocess.entries import PendingEntries
from megatron_lpr.errors import UserError
from megatron_lpr.files.locks import FolderLocks
from megatron_lpr.recipe.text_settings import SourceConfig

TEXTS = [f"the quick fox number {number} árvíz" for number in range(30)]
FORK = multiprocessing.get_context("fork")


def source(path: str, name: str, language: str | None = None, role: str = "expanded", **more) -> SourceConfig:
    return SourceConfig(name=name, files=(path,), language=language or name, role=role, **more)


def at_once(*jobs) -> list[str]:
    """What went wrong in each of `jobs`, (sources, options of preprocess), which start together in processes."""
    results, barrier = FORK.Queue(), FORK.Barrier(len(jobs))

    def run(number: int, sources, options):
        barrier.wait()
        try:
            preprocess(sources, workers=1, **options)
            results.put((number, ""))
        except UserError as error:
            results.put((number, str(error)))
        except BaseException as error:
            results.put((number, f"TRACEBACK {error!r}"))

    processes = [FORK.Process(target=run, args=(number, *job)) for number, job in enumerate(jobs)]
    for process in processes:
        process.start()
    outcome = dict(results.get(timeout=120) for _ in jobs)
    for process in processes:
        process.join()
    return [outcome[number] for number in range(len(jobs))]


@pytest.fixture
def options(hf_tokenizer, tmp_path) -> dict:
    return {"tokenizer": hf_tokenizer, "output": str(tmp_path / "out")}


@pytest.mark.slow
def test_different_corpora_at_once_all_get_their_entries(write_text, options, tmp_path):
    path = write_text("a.jsonl", TEXTS)
    for number in range(8):
        jobs = [([source(path, f"c{number}.{name}")], options) for name in range(5)]
        assert at_once(*jobs) == [""] * 5
        names = {corpus.name for corpus in Manifest.load(str(tmp_path / "out" / "manifest.yaml")).corpora}
        assert names == {f"c{round}.{name}" for round in range(number + 1) for name in range(5)}


@pytest.mark.slow
def test_one_corpus_at_once_is_made_by_one_process(write_text, options, tmp_path):
    path, other = write_text("a.jsonl", TEXTS), write_text("b.jsonl", TEXTS[:7])
    refused = 0
    for number in range(8):
        name = f"hu{number}"
        outcome = at_once(*[([source(text, name)], options) for text in (path, path, other, other)])
        for error in filter(None, outcome):
            assert "another process is making" in error or "was made from other text" in error, error
            refused += 1
        corpora = {corpus.name: corpus for corpus in Manifest.load(str(tmp_path / "out" / "manifest.yaml")).corpora}
        documents = 30 if "" in outcome[:2] else 7
        assert corpora[name].documents == len(IndexedCorpus(corpora[name].prefix)) == documents
        assert ("" in outcome[:2]) != ("" in outcome[2:])
        assert not os.path.exists(tmp_path / "out" / f"{name}.parts")
    assert refused >= 16


def test_who_is_killed_with_locks_leaves_none(write_text, options, tmp_path):
    (tmp_path / "out").mkdir()
    held = FORK.Event()

    def hold():
        with FolderLocks(options["output"]) as locks, locks.manifest():
            locks.take("hu")
            held.set()
            time.sleep(600)

    holder = FORK.Process(target=hold)
    holder.start()
    held.wait(60)
    with FolderLocks(options["output"]) as locks, pytest.raises(UserError, match="another process is making .*/hu"):
        locks.take("hu")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert at_once(([source(write_text("a.jsonl", TEXTS), "hu")], options)) == [""]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"role": "original"}, "corpus 'hu' is made but not entered.*'hu' is original in corpus 'b' and expanded in"),
        ({"tokenizer": True}, "corpus 'hu' is made but not entered.*holds corpora of another tokenizer"),
        ({}, None),
    ],
)
def test_the_manifest_changes_meanwhile(write_text, options, sp_tokenizer, tmp_path, monkeypatch, change, message):
    path, make_corpus = write_text("a.jsonl", TEXTS), module.make_corpus

    def slowly(*arguments, **settings):
        monkeypatch.setattr(module, "make_corpus", make_corpus)
        theirs = options | ({"tokenizer": sp_tokenizer} if "tokenizer" in change else {})
        other = source(path, "b", language="hu", role=change.get("role", "expanded"))
        assert at_once(([other], theirs)) == [""]
        return make_corpus(*arguments, **settings)

    monkeypatch.setattr(module, "make_corpus", slowly)
    if message is not None:
        with pytest.raises(UserError, match=message):
            preprocess([source(path, "hu")], **options)
        assert (tmp_path / "out" / "hu.parts").exists()
    else:
        preprocess([source(path, "hu")], **options)
    names = [corpus.name for corpus in Manifest.load(str(tmp_path / "out" / "manifest.yaml")).corpora]
    assert names == (["b"] if message else ["b", "hu"])


def test_roles_change_in_all_corpora_of_a_language(write_text, options, capsys):
    path, other = write_text("a.jsonl", TEXTS), write_text("b.jsonl", TEXTS[:9])
    preprocess([source(path, "a", "hu"), source(path, "b", "hu")], **options)
    made = preprocess([source(path, "a", "hu", "original"), source(path, "b", "hu", "original")], **options)
    assert [corpus.role for corpus in made.corpora] == ["original"] * 2
    sources = [source(path, "a", "hu"), source(other, "b", "hu")]
    assert [corpus.role for corpus in preprocess(sources, overwrite=True, **options).corpora] == ["expanded"] * 2
    sources = [source(other, "a", "hu", "original"), source(path, "b", "hu", "original")]
    made = preprocess(sources, overwrite=True, **options)
    assert [(corpus.role, corpus.documents) for corpus in made.corpora] == [("original", 9), ("original", 30)]
    with pytest.raises(UserError, match="'hu' is original in corpus 'b' and expanded in 'a'"):
        preprocess([source(path, "a", "hu")], overwrite=True, **options)


def test_a_file_system_without_locks_is_warned_of(write_text, options, monkeypatch, capsys):
    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert len(preprocess([source(write_text("a.jsonl", TEXTS), name) for name in "ab"], **options).corpora) == 2
    errors = capsys.readouterr().err
    assert errors.count("without locks (No locks available)") == 1


def test_thousands_of_entries_are_not_written_one_by_one(make_manifest, tmp_path, monkeypatch):
    manifest, saves = make_manifest(("c", "c", "expanded", 1.0, 50)), []

    now = [0.0]

    def save(self):
        saves.append(len(self.corpora))
        now[0] += 0.05

    monkeypatch.setattr(Manifest, "save", save)
    monkeypatch.setattr(entries_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    (entry,) = manifest.corpora
    with FolderLocks(str(tmp_path)) as locks:
        with PendingEntries(lambda: manifest, locks) as entries:
            for number in range(3000):
                entries.add([dataclasses.replace(entry, name=f"c{number}")])
                now[0] += 0.001
    assert saves[0] == 2 and 2 < len(saves) <= 2 + 0.1 * now[0] / 0.05
