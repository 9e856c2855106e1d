"""preprocess.heldout: which documents are held out of a corpus, where they go, and what happens to them afterwards."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from preprocessing import files, preprocess, run

from megatron_lpr import cli
from megatron_lpr.data.corpus.indexed import IndexedCorpus, IndexedWriter
from megatron_lpr.data.corpus.manifest import HeldOut, Manifest
from megatron_lpr.data.preprocess import held_out, make_corpus
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.held_out import read_corpus
from megatron_lpr.recipe.text_settings import EvaluationCorpus, SourceConfig

TEXTS = [f"the quick fox number {number} árvíz" * (1 + number % 3) for number in range(600)]
SHARE = 0.05
FILE = "hu.heldout.jsonl.gz"


def hash_of(text: str) -> int:
    key = b"megatron_lpr heldout"
    return int.from_bytes(hashlib.blake2b(text.encode(), key=key, digest_size=8).digest(), "big")


def expected(texts: list[str], share: float = SHARE) -> list[str]:
    return sorted((text for text in texts if hash_of(text) / 2**64 < share), key=hash_of)


def texts_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in gzip.open(path, "rt", encoding="utf-8")]


def source(*paths: str, name: str = "hu", **more) -> SourceConfig:
    return SourceConfig(name=name, files=paths, **{"language": "hu", "role": "expanded"} | more)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def test_they_are_those_with_the_smallest_hashes_and_never_trained_on(write_text, hf_tokenizer, out):
    [corpus] = run(write_text("a.jsonl", TEXTS), hf_tokenizer, out, workers=1, heldout=SHARE).corpora
    left_out = expected(TEXTS)
    assert 15 < len(left_out) < 45 and texts_in(out / FILE) == left_out
    tokenizer, trained = load_tokenizer(hf_tokenizer), IndexedCorpus(str(out / "hu"))
    documents = sorted(tuple(trained.document(index)[:-1].tolist()) for index in range(len(trained)))
    assert documents == sorted(tuple(ids) for ids in tokenizer.encode_batch([t for t in TEXTS if t not in left_out]))
    size = sum(len(text.encode()) for text in left_out)
    digest = hashlib.sha256((out / FILE).read_bytes()).hexdigest()
    assert corpus.heldout == HeldOut(share=SHARE, documents=len(left_out), bytes=size, digest=digest)
    assert Manifest.load(str(out / "manifest.yaml")).corpora == (corpus,)


def test_off_by_default(write_text, hf_tokenizer, out):
    run(write_text("a.jsonl", TEXTS), hf_tokenizer, out, workers=1)
    assert sorted(files(out)) == ["hu.bin", "hu.idx", "manifest.yaml"]
    assert "heldout" not in (out / "manifest.yaml").read_text()


@pytest.mark.slow
def test_blocks_and_processes_change_nothing(write_text, hf_tokenizer, out, tmp_path, monkeypatch):
    path = write_text("a.jsonl", TEXTS)
    run(path, hf_tokenizer, out, workers=1, heldout=SHARE)
    for constant in ("BLOCK_BYTES", "_LEAST_BLOCK_BYTES", "BUCKET_BYTES"):
        monkeypatch.setattr(make_corpus, constant, 3000)
    run(path, hf_tokenizer, tmp_path / "two", workers=2, heldout=SHARE)
    assert files(tmp_path / "two") == files(out)


def test_equal_documents_are_on_one_side_in_all_corpora(write_text, hf_tokenizer, tmp_path, out):
    """In any format, at any place, with any seed; and a larger share holds out what a smaller one does."""
    import pyarrow
    import pyarrow.parquet

    texts = [text.rstrip() for text in TEXTS]
    (tmp_path / "lines.txt").write_text("\n".join(texts[::-1]) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[100:]}), tmp_path / "rows.parquet")
    sources = [
        source(write_text("a.jsonl", texts + texts)),
        source(str(tmp_path / "lines.txt"), name="lines", sample_by="line"),
        source(str(tmp_path / "rows.parquet"), name="rows"),
    ]
    preprocess(sources, tokenizer=hf_tokenizer, output=str(out), workers=1, heldout=SHARE, seed=7)
    left_out = expected(texts)
    assert texts_in(out / FILE) == [text for text in left_out for _ in range(2)]
    assert texts_in(out / "lines.heldout.jsonl.gz") == left_out
    assert texts_in(out / "rows.heldout.jsonl.gz") == expected(texts[100:])
    run(write_text("b.jsonl", texts), hf_tokenizer, tmp_path / "more", workers=1, heldout=2 * SHARE)
    more = texts_in(tmp_path / "more" / FILE)
    assert more[: len(left_out)] == left_out and len(more) > len(left_out)


def test_evaluation_reads_them(write_text, hf_tokenizer, out):
    run(write_text("a.jsonl", TEXTS), hf_tokenizer, out, workers=1, heldout=SHARE)
    corpus = EvaluationCorpus(name="hu", files=(str(out / FILE),), language="hu", role="expanded")
    assert read_corpus(corpus) == expected(TEXTS)


def test_of_documents_with_a_language_field_the_language_is_kept(write_text, hf_tokenizer, out):
    lines = [json.dumps({"text": text, "lang": ("hu", "de")[n % 2]}).encode() for n, text in enumerate(TEXTS)]
    languages = {"hu": "expanded", "de": "original"}
    mixed = source(write_text("a.jsonl", lines), languages=languages, language_field="lang")
    preprocess([mixed], tokenizer=hf_tokenizer, output=str(out), workers=1, heldout=SHARE)
    for line in gzip.open(out / FILE, "rt", encoding="utf-8"):
        document = json.loads(line)
        assert document["language"] == ("hu", "de")[TEXTS.index(document["text"]) % 2]


@pytest.mark.parametrize("when", ["merge", "collect", "manifest"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    write_text, hf_tokenizer, out, tmp_path, small_blocks, monkeypatch, when
):
    path = write_text("a.jsonl", TEXTS)
    options = {"workers": 1, "heldout": SHARE}
    run(path, hf_tokenizer, tmp_path / "whole", **options)

    class Killed(BaseException):
        pass

    def kill(*arguments, **more):
        raise Killed

    where = {"merge": (make_corpus, "merge"), "collect": (held_out, "collect"), "manifest": (Manifest, "save")}[when]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*where, kill)
        run(path, hf_tokenizer, out, **options)
    parts = sorted((out / "hu.parts").glob("*.heldout"))
    assert len(parts) > 5
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    parts[1].unlink()
    run(path, hf_tokenizer, out, **options)
    assert files(out) == files(tmp_path / "whole")


def test_parts_that_are_combined_keep_theirs(write_text, hf_tokenizer, out, tmp_path, small_blocks, monkeypatch):
    path = write_text("a.jsonl", TEXTS)
    run(path, hf_tokenizer, tmp_path / "whole", workers=1, heldout=SHARE)
    monkeypatch.setattr(make_corpus, "fan_in", lambda: 3)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(held_out, "collect", lambda *arguments: 1 / 0)
        run(path, hf_tokenizer, out, workers=1, heldout=SHARE)
    next((out / "hu.parts").glob("*.heldout")).unlink()
    run(path, hf_tokenizer, out, workers=1, heldout=SHARE)
    assert files(out) == files(tmp_path / "whole")


def test_another_share_is_another_corpus(write_text, hf_tokenizer, out, capsys):
    path = write_text("a.jsonl", TEXTS)
    run(path, hf_tokenizer, out, workers=1, heldout=SHARE)
    before = files(out)
    run(path, hf_tokenizer, out, workers=1, heldout=SHARE)
    assert files(out) == before and "unchanged" in capsys.readouterr().err
    for share in (0.1, 0.0):
        with pytest.raises(UserError, match=rf"heldout: {share}; corpus 'hu' in .* was made with 0.05; pass --overwri"):
            run(path, hf_tokenizer, out, workers=1, heldout=share)
    assert files(out) == before
    run(path, hf_tokenizer, out, workers=1, heldout=0.1, overwrite=True)
    assert texts_in(out / FILE) == expected(TEXTS, 0.1)
    run(path, hf_tokenizer, out, workers=1, overwrite=True)
    assert sorted(files(out)) == ["hu.bin", "hu.idx", "manifest.yaml"]


def test_a_file_of_somebody_else_stays(write_text, hf_tokenizer, out):
    out.mkdir()
    (out / FILE).write_bytes(b"mine")
    path = write_text("a.jsonl", TEXTS)
    with pytest.raises(UserError, match=f"{FILE} is there, but not in .*; choose another name for the corpus"):
        run(path, hf_tokenizer, out, workers=1, heldout=SHARE)
    run(path, hf_tokenizer, out, workers=1)
    run(path, hf_tokenizer, out, workers=1, seed=1, overwrite=True)
    assert (out / FILE).read_bytes() == b"mine"


def test_damage_is_seen(write_text, hf_tokenizer, out, capsys):
    path = write_text("a.jsonl", TEXTS)
    run(path, hf_tokenizer, out, workers=1, heldout=SHARE)
    whole = (out / FILE).read_bytes()
    assert cli.main(["verify-data", str(out / "manifest.yaml")]) == 0
    assert f"{FILE}: ok" in capsys.readouterr().out
    (out / FILE).write_bytes(whole[:-1] + b"x")
    assert cli.main(["verify-data", str(out / "manifest.yaml")]) == 2
    assert f"{FILE} holds other bytes than were written" in capsys.readouterr().out
    run(path, hf_tokenizer, out, workers=1, heldout=SHARE)
    assert "hu: made again, because" in capsys.readouterr().err and (out / FILE).read_bytes() == whole


def test_too_much_and_too_little(write_text, hf_tokenizer, out, capsys):
    path = write_text("a.jsonl", TEXTS[:3])
    above = max(map(hash_of, TEXTS[:3])) / 2**64 + 1e-6
    with pytest.raises(UserError, match=r"heldout: 0\.\d+; holds out every document of corpus 'hu'; lower it"):
        run(path, hf_tokenizer, out, workers=1, heldout=above)
    [corpus] = run(path, hf_tokenizer, out, workers=1, heldout=1e-9).corpora
    assert (corpus.documents, corpus.heldout.documents) == (3, 0) and texts_in(out / FILE) == []
    assert "holds out none of the 3 documents" in capsys.readouterr().err
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"preprocess.heldout: {share}; at least 0, below 1"):
            run(path, hf_tokenizer, out, workers=1, heldout=share)


def test_nothing_is_held_out_of_a_corpus_that_exists(write_text, hf_tokenizer, tmp_path, out, capsys):
    tokenizer = load_tokenizer(hf_tokenizer)
    with IndexedWriter(str(tmp_path / "old"), tokenizer.vocab_size) as writer:
        tokens = np.array([*tokenizer.encode_batch(["fox"])[0], tokenizer.eod_id], writer.dtype)
        writer.add_documents(tokens, np.array([len(tokens)], np.int32))
    old = SourceConfig(name="old", prefix=str(tmp_path / "old"), language="en", role="original")
    options = {"tokenizer": hf_tokenizer, "output": str(out), "workers": 1, "heldout": SHARE}
    with pytest.raises(UserError, match="preprocess.heldout: 0.05; has no effect on corpora that exist already"):
        preprocess([old], **options)
    manifest = preprocess([source(write_text("a.jsonl", TEXTS)), old], **options)
    assert [corpus.heldout is not None for corpus in manifest.corpora] == [True, False]
    assert "nothing is held out of old, which exist" in capsys.readouterr().err


def test_on_the_command_line(write_text, hf_tokenizer, out, capsys):
    one = ["--input", write_text("a.jsonl", TEXTS), "--name", "hu", "--language", "hu", "--role", "expanded"]
    one += ["--tokenizer", hf_tokenizer, "--output", str(out), "--heldout", "0.05"]
    assert cli.main(["preprocess", *one]) == 0
    left_out = expected(TEXTS)
    size = sum(len(text.encode()) for text in left_out)
    said = f"; held out {len(left_out)} documents, {size:,} bytes: {out / FILE}"
    assert said in capsys.readouterr().out
