"""Small corpora, tokenizers and text files for the data tests."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import zstandard
from manifest_entries import entry, tokenizer_record

from megatron_lpr.data.corpus.indexed import IndexedWriter
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.corpus.spot_check import spot_digests

VOCAB_SIZE = 1000
TEXT = "a quick brown fox jumps over the lazy dog and naps; árvíztűrő tükörfúrógép"


@pytest.fixture
def write_corpus(tmp_path):
    """write_corpus(name, documents) -> prefix"""

    def write(name: str, documents: list[list[int]], vocab_size: int = VOCAB_SIZE) -> str:
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, vocab_size) as writer:
            lengths = np.array([len(document) for document in documents], np.int32)
            writer.add_documents(np.concatenate(documents).astype(writer.dtype), lengths)
        return prefix

    return write


@pytest.fixture
def make_manifest(tmp_path, write_corpus):
    """make_manifest((name, language, role, weight, tokens), ...) -> saved Manifest of random tokens."""

    def make(*corpora: tuple[str, str, str, float, int]) -> Manifest:
        entries = []
        for number, (name, language, role, weight, tokens) in enumerate(corpora):
            ids = np.random.default_rng(number).integers(3, VOCAB_SIZE, tokens)
            prefix = write_corpus(name, [ids])
            digest = f"{number:064x}"
            spots = spot_digests(prefix, digest, languages=False)
            fields = {"prefix": prefix, "language": language, "weight": weight, "tokens": tokens, "spot_digests": spots}
            entries.append(entry(name, role, digest=digest, **fields))
        tokenizer = tokenizer_record(VOCAB_SIZE, eod_id=2)
        manifest = Manifest(path=str(tmp_path / "manifest.yaml"), tokenizer=tokenizer, corpora=tuple(entries))
        manifest.save()
        return manifest

    return make


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory) -> str:
    """Folder of a small byte-level BPE tokenizer whose <eod> has id 1."""
    folder = tmp_path_factory.mktemp("hf_tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eod>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eod>"}))
    return str(folder)


@pytest.fixture(scope="session")
def sp_tokenizer(tmp_path_factory) -> str:
    """A small SentencePiece .model file."""
    folder = tmp_path_factory.mktemp("sp_tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split() * 3),
        model_prefix=str(folder / "toy"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(folder / "toy.model")


@pytest.fixture
def write_text(tmp_path):
    """write_text(name, lines) -> path; a string becomes {"text": ...}, bytes are written as they are."""

    def write(name: str, lines: list[str | bytes]) -> str:
        path = Path(tmp_path / name)
        encoded = [line if isinstance(line, bytes) else json.dumps({"text": line}).encode() for line in lines]
        content = b"".join(line + b"\n" for line in encoded)
        if name.endswith(".gz"):
            content = gzip.compress(content)
        elif name.endswith(".zst"):
            content = zstandard.compress(content)
        elif name.endswith(".bz2"):
            content = bz2.compress(content)
        elif name.endswith(".xz"):
            content = lzma.compress(content)
        path.write_bytes(content)
        return str(path)

    return write
