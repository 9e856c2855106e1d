"""Megatron corpora that are there already, taken into a manifest as they are."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from preprocessing import preprocess

from megatron_lpr.data.corpus.indexed import IndexedCorpus, LanguageRunsWriter
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import SourceConfig

EOD = 1
DOCUMENTS = [[[5, 6], [7, EOD]], [[9, EOD]], [[3, 4, 5], [6], [8, EOD]]]  # documents of sequences of tokens


@pytest.fixture
def megatron_corpus(tmp_path):
    """megatron_corpus(documents, dtype) -> prefix, written by Megatron-Core's builder."""
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

    def write(documents=DOCUMENTS, dtype=np.int32, name: str = "theirs") -> str:
        prefix = str(tmp_path / name)
        builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for sequences in documents:
            builder.add_document(np.array(sum(sequences, []), dtype), [len(sequence) for sequence in sequences])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


@pytest.fixture
def take(hf_tokenizer, tmp_path):
    def take(prefix: str, overwrite: bool = False, **more) -> Manifest:
        source = SourceConfig(**{"name": "hu", "prefix": prefix, "language": "hu", "role": "expanded"} | more)
        out = str(tmp_path / "out")
        return preprocess([source], tokenizer=hf_tokenizer, output=out, overwrite=overwrite)

    return take


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, np.uint8])
def test_taken_as_it_is(megatron_corpus, take, dtype, capsys):
    prefix = megatron_corpus(dtype=dtype)
    before = {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")}
    manifest = take(prefix)
    assert "end-of-document" not in capsys.readouterr().err
    [entry] = Manifest.load(manifest.path).corpora
    assert (entry.documents, entry.tokens, entry.source) == (3, 12, None)
    assert entry.digest == hashlib.sha256(before[".bin"]).hexdigest()
    assert {suffix: Path(prefix + suffix).read_bytes() for suffix in before} == before
    corpus = IndexedCorpus(entry.prefix)
    assert [corpus.document(i).tolist() for i in range(3)] == [sum(document, []) for document in DOCUMENTS]
    assert take(prefix, weight=2).corpora[0].weight == 2


def test_documents_without_end_are_told(megatron_corpus, take, capsys):
    take(megatron_corpus([[[5, 6]], [[7, EOD]], [[8]]]))
    assert "hu: 2 of 3 documents do not end with the end-of-document token 1" in capsys.readouterr().err


@pytest.mark.parametrize("tokens, first", [([5, 300, EOD], "token 1 is 300"), ([5, 6, -1, EOD], "token 2 is -1")])
def test_tokens_of_another_tokenizer(megatron_corpus, take, tokens, first, tmp_path):
    with pytest.raises(UserError, match=f"theirs.bin was not made with the tokenizer .*{first}, its vocabulary"):
        take(megatron_corpus([[tokens]]))
    assert not (tmp_path / "out" / "manifest.yaml").exists()


def test_with_languages(megatron_corpus, take):
    prefix = megatron_corpus()
    languages = {"hu": "expanded", "en": "original"}
    with pytest.raises(UserError, match="cannot open .*theirs.lang"):
        take(prefix, languages=languages)
    writer = LanguageRunsWriter(prefix)
    writer.add(np.array([0] * 4 + [1] * 8, np.uint16))
    writer.close()
    entry = take(prefix, languages=languages).corpora[0]
    assert (entry.languages, entry.language_digest) == (languages, writer.digest)


def test_not_replaced_by_accident(megatron_corpus, take, hf_tokenizer, write_text, tmp_path):
    def make(**options):
        source = SourceConfig(name="hu", files=(write_text("a.jsonl", ["fox"]),), language="hu", role="expanded")
        return preprocess([source], tokenizer=hf_tokenizer, output=str(tmp_path / "out"), **options)

    take(megatron_corpus())
    with pytest.raises(UserError, match="corpus 'hu' .* was made from other text"):
        make()
    with pytest.raises(UserError, match="corpus 'hu' .* was made from other text"):
        take(megatron_corpus(name="others"))
    assert make(overwrite=True).corpora[0].documents == 1
    with pytest.raises(UserError, match="corpus 'hu' .* was made from other text"):
        take(megatron_corpus())
    (tmp_path / "out" / "manifest.yaml").unlink()
    with pytest.raises(UserError, match="hu.bin is there, but not in .*manifest.yaml; take it over by prefix"):
        make()


def test_mistakes_are_named(megatron_corpus, take, tmp_path):
    prefix = megatron_corpus()

    def refused(message: str, prefix: str = prefix, **more):
        with pytest.raises(UserError, match=message):
            take(prefix, **more)

    refused("both a prefix and files", files=("a.jsonl",))
    refused("its languages are in its .lang file", language_field="lang", languages={"hu": "expanded"})
    refused("corpus 'hu': there is no .*nowhere.idx", str(tmp_path / "nowhere"))
    refused("theirs.bin.idx; a prefix is the path of both files without .bin and .idx", f"{prefix}.bin")
    refused("theirs.bin.idx", f"{prefix}.bin")
    with open(f"{prefix}.idx", "r+b") as file:  # the second sequence's length
        file.seek(34 + 4)
        file.write((-2).to_bytes(4, "little", signed=True))
    refused("theirs.idx is corrupt: document 0 lies outside the corpus, or out of order")


def test_documents_must_open_as_the_manifest_says(megatron_corpus, hf_tokenizer, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    for file in Path(hf_tokenizer).iterdir():
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<eod>", "bos_token": "<pad>"}')

    def take(name: str, bos: str, documents: list) -> str:
        source = SourceConfig(name=name, prefix=megatron_corpus(documents, name=name), language="hu", role="expanded")
        folders = {"tokenizer": str(tmp_path / "tokenizer"), "output": str(tmp_path / f"out-{bos}")}
        preprocess([source], **folders, bos=bos)
        return capsys.readouterr().err

    with_bos, without = [[[0, 5, EOD]], [[0, EOD]]], [[[5, EOD]], [[6, EOD]]]
    assert take("a", "true", with_bos) == "" and take("b", "false", without) == ""
    assert "c: 2 of 4 documents do not open with the BOS token 0" in take("c", "true", with_bos + without)
    assert "d: each of its 2 documents opens with token 0; if that is the BOS token" in take("d", "false", with_bos)
    with pytest.raises(UserError, match="no document in .*e.bin opens with the BOS token 0"):
        take("e", "true", without)
