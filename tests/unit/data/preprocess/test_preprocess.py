"""Text to corpora and manifest, end to end."""

import errno
import os

import pytest
from preprocessing import preprocess

from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.preprocess import tokenize_parts
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import SourceConfig

TEXTS = [f"the quick fox number {number} árvíz" for number in range(50)]


@pytest.fixture
def run(hf_tokenizer, tmp_path):
    """run(source, ...) -> manifest in tmp_path/out"""

    def run(*sources: SourceConfig, output: str = "out", **options) -> Manifest:
        options = {"tokenizer": hf_tokenizer, "output": str(tmp_path / output)} | options
        return preprocess(sources, **options)

    return run


def source(*files: str, name: str = "hu", language: str = "hu", role: str = "expanded", **more) -> SourceConfig:
    return SourceConfig(name=name, files=files, language=language, role=role, **more)


def listing(folder) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != ".lock")


def documents(manifest: Manifest, number: int = 0) -> list[tuple[int, ...]]:
    corpus = IndexedCorpus(manifest.corpora[number].prefix)
    return [tuple(corpus.document(i).tolist()) for i in range(len(corpus))]


@pytest.mark.slow
def test_writes_every_document_with_eod_in_shuffled_order(run, write_text, hf_tokenizer, tmp_path):
    files = write_text("a.jsonl", TEXTS[:20]), write_text("b.jsonl.gz", TEXTS[20:])
    written = documents(run(source(*files)))
    tokenizer = load_tokenizer(hf_tokenizer)
    expected = [(*ids, tokenizer.eod_id) for ids in tokenizer.encode_batch(TEXTS)]
    assert sorted(written) == sorted(expected)
    assert sum(a == b for a, b in zip(written, expected, strict=True)) < 10
    assert listing(tmp_path / "out") == ["hu.bin", "hu.idx", "manifest.yaml"]


def test_manifest_entry(run, write_text, hf_tokenizer, tmp_path):
    path = write_text("a.jsonl", TEXTS)
    made = run(source(path, weight=2), source(path, name="en", language="en", role="original"))
    loaded = Manifest.load(str(tmp_path / "out" / "manifest.yaml"))
    assert loaded == made
    hu, en = loaded.corpora
    assert (hu.name, hu.language, hu.role, hu.weight, en.name) == ("hu", "hu", "expanded", 2.0, "en")
    assert hu.documents == 50 and hu.tokens == sum(len(document) for document in documents(made))
    assert loaded.tokenizer.sha256 == load_tokenizer(hf_tokenizer).sha256


def test_sentencepiece(run, write_text, sp_tokenizer):
    written = documents(run(source(write_text("a.jsonl", TEXTS)), tokenizer=sp_tokenizer))
    tokenizer = load_tokenizer(sp_tokenizer)
    expected = [(tokenizer.bos_id, *ids, tokenizer.eod_id) for ids in tokenizer.encode_batch(TEXTS)]
    assert sorted(written) == sorted(expected)


def test_batches_are_cut_by_size_without_losing_documents(run, write_text):
    texts = [f"fox {number}" for number in range(2500)]
    assert len(set(documents(run(source(write_text("a.jsonl", texts)))))) == 2500


def test_order_depends_on_the_seed_only(run, write_text):
    path = write_text("a.jsonl", TEXTS)
    first = documents(run(source(path)))
    assert documents(run(source(path), output="again")) == first
    other = documents(run(source(path), output="other", seed=1))
    assert other != first and sorted(other) == sorted(first)


def test_repeating_is_a_no_op(run, write_text, tmp_path, capsys):
    path = write_text("a.jsonl", TEXTS)
    first = run(source(path))
    before = os.stat(tmp_path / "out" / "hu.bin")
    capsys.readouterr()
    assert run(source(path)) == first
    assert "hu: unchanged" in capsys.readouterr().err
    after = os.stat(tmp_path / "out" / "hu.bin")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    weighted = run(source(path, weight=3, language="fi"))
    assert (weighted.corpora[0].weight, weighted.corpora[0].language) == (3.0, "fi")
    assert Manifest.load(weighted.path) == weighted


def test_adding_a_corpus_keeps_the_others(run, write_text):
    first = run(source(write_text("a.jsonl", TEXTS)))
    both = run(source(write_text("b.jsonl", TEXTS[:3]), name="en", language="en", role="original"))
    assert both.corpora[0] == first.corpora[0] and both.corpora[1].documents == 3


def test_replaces_only_when_told(run, write_text):
    run(source(write_text("a.jsonl", TEXTS)))
    changed = source(write_text("a.jsonl", TEXTS[:7]))
    with pytest.raises(UserError, match="corpus 'hu' .* made from other text.*pass --overwrite"):
        run(changed)
    assert run(changed, overwrite=True).corpora[0].documents == 7


def test_lost_or_half_written_files_are_made_again(run, write_text, tmp_path, capsys):
    path = write_text("a.jsonl", TEXTS)
    first = run(source(path))
    os.remove(tmp_path / "out" / "hu.idx")
    (tmp_path / "out" / "hu.parts").mkdir()
    (tmp_path / "out" / "hu.parts" / "00000000.part.partial").write_bytes(b"killed")
    assert run(source(path)) == first
    assert "hu: made again" in capsys.readouterr().err
    assert listing(tmp_path / "out") == ["hu.bin", "hu.idx", "manifest.yaml"]


BAD_LINES = [
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (b'{"text": "fox"', "broken JSON"),
    (b'{"content": "fox", "url": 1}', 'no "text" string .text_field says which it is; there is content, url.; correct'),
    (b'{"text": 3, "\\ud800": 1}', 'no "text" string .it is int; write it as text'),
    (b'["fox"]', "no JSON object .read as JSON lines, an object on each"),
    (b'{"text": " \\n"}', "empty text"),
    (b'{"text": "\\ud800"}', "unpaired surrogate"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_bad_lines_are_refused_by_file_and_line(run, write_text, tmp_path, line, reason):
    path = write_text("a.jsonl", ["fox", b"", line, "dog"])
    with pytest.raises(UserError, match=f"a.jsonl:3: {reason}"):
        run(source(path))
    assert listing(tmp_path / "out") == []


def test_bad_lines_are_skipped_counted_and_reported(run, write_text, capsys):
    path = write_text("a.jsonl", ["fox", *(line for line, _ in BAD_LINES), b"{}", "dog"])
    corpus = run(source(path), on_bad_line="skip").corpora[0]
    assert (corpus.documents, corpus.source.skipped_lines) == (2, 8)
    errors = capsys.readouterr().err
    assert 'left out 3 lines (no "text" string), the first at ' in errors and "a.jsonl:4" in errors
    run(source(path), on_bad_line="skip")
    assert "hu: unchanged" in capsys.readouterr().err
    with pytest.raises(UserError, match="a.jsonl:2: invalid UTF-8"):
        run(source(path))


def test_a_corpus_without_documents(run, write_text, tmp_path):
    with pytest.raises(UserError, match="corpus 'hu' is empty"):
        run(source(write_text("a.jsonl", [])))
    with pytest.raises(UserError, match="corpus 'hu' is empty"):
        run(source(write_text("b.jsonl", [b"{}"])), on_bad_line="skip")
    assert listing(tmp_path / "out") == ["hu.bad_lines.txt"]


def test_a_broken_gzip_file(run, write_text, tmp_path):
    path = write_text("a.jsonl.gz", TEXTS)
    os.truncate(path, 100)
    with pytest.raises(UserError, match="a.jsonl.gz is not a complete gzip file"):
        run(source(path))
    (tmp_path / "b.jsonl.gz").write_text('{"text": "fox"}')
    with pytest.raises(UserError, match="b.jsonl.gz is not a complete gzip file"):
        run(source(str(tmp_path / "b.jsonl.gz")))


def test_mistakes_are_found_before_anything_is_written(run, write_text, sp_tokenizer, tmp_path):
    path = write_text("a.jsonl", TEXTS)

    def refused(message: str, *sources: SourceConfig, **options):
        with pytest.raises(UserError, match=message):
            run(source(path), *sources, **options)
        assert not os.path.exists(tmp_path / "out")

    english = {"name": "en", "language": "en"}
    refused("preprocess.corpora: en: no file nowhere.jsonl", source("nowhere.jsonl", **english))
    refused("names no text files", source(**english))
    refused("two corpora are called 'hu'", source(path))
    refused("corpus name 'a/b' is no file name", source(path, name="a/b"))
    refused("unknown role 'orig'", source(path, **english, role="orig"))
    refused(
        "language 'hu' is expanded in corpus 'hu' and original in 'en'",
        source(path, name="en", role="original"),
    )
    refused(r"preprocess.corpora\[1\].weight: 0; above 0", source(path, **english, weight=0))
    refused("no tokenizer at", tokenizer=str(tmp_path / "nowhere"))
    refused("preprocess.seed: -1; at least 0", seed=-1)
    with pytest.raises(UserError, match="no corpora to preprocess"):
        run()
    with pytest.raises(UserError, match="output folder '.*a.jsonl/out' cannot be made: '.*a.jsonl' is a file"):
        run(source(path), output="a.jsonl/out")
    run(source(path))
    with pytest.raises(UserError, match="holds corpora of another tokenizer"):
        run(source(path, name="hu2"), tokenizer=sp_tokenizer)


def test_a_file_twice(run, write_text, tmp_path, capsys):
    path = write_text("a.jsonl", TEXTS)
    os.symlink(path, tmp_path / "link.jsonl")
    os.link(path, tmp_path / "hard.jsonl")
    for files, also in (
        ((path, path), ""),
        ((path, str(tmp_path / "a*.jsonl")), ""),
        ((path, str(tmp_path / "l*.jsonl")), f", also as {path}"),
        ((path, str(tmp_path / "hard.jsonl")), f", also as {path}"),
        ((path, f"{tmp_path}/../{tmp_path.name}/a.jsonl"), f", also as {path}"),
    ):
        with pytest.raises(UserError, match=f"corpus 'hu' reads .*jsonl twice{also}; list it once"):
            run(source(*files))
        with pytest.raises(UserError, match="corpus 'hu' reads .* twice"):
            run(source(path, name="other"), source(*files))
    capsys.readouterr()
    run(source(path), source(str(tmp_path / "link.jsonl"), name="other"))
    assert capsys.readouterr().err.count("warning: corpora 'hu' and 'other' both read ") == 1


def test_archives_and_files_of_no_byte(run, tmp_path):
    for name in ("a.jsonl.zip", "a.tar.gz", "a.jsonl.lz4"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name}: .* files are not read; unpack it"):
            run(source(str(tmp_path / name)))
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match="a.jsonl.gz is empty"):
        run(source(str(tmp_path / "a.jsonl.gz")))


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e400", "-1e99999", "1" * 5000, "NaN"])
def test_large_numbers_in_json_lines(run, write_text, number):
    lines = [f'{{"text": "fox", "id": {number}}}'.encode(), f'{{"text": {number}}}'.encode()]
    corpus = run(source(write_text("a.jsonl", ["fox", *lines])), on_bad_line="skip").corpora[0]
    assert corpus.documents + corpus.source.skipped_lines == 3 and corpus.source.skipped_lines <= 2


def test_shared_memory_that_is_full_is_named(hf_tokenizer, tmp_path, monkeypatch):
    def no_room(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a semaphore does, without a file's name

    (tmp_path / "a.txt").write_text("the quick brown fox")
    source = SourceConfig(name="hu", files=(str(tmp_path / "a.txt"),), language="hu", role="expanded")
    monkeypatch.setattr(tokenize_parts, "ProcessPoolExecutor", no_room)
    with pytest.raises(UserError, match=r"processes: No space left on device; their semaphores want .* of a /dev/shm"):
        preprocess([source], tokenizer=hf_tokenizer, output=str(tmp_path / "out"))
