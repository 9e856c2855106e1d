"""Both kinds of tokenizer files behind one face."""

import hashlib
import importlib.util
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from preprocessing import preprocess

from megatron_lpr.data.text.special_tokens import SpecialTokens
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import SourceConfig

TEXTS = ["the lazy dog", "árvíz", "a", "fox " * 50]
HARD_TEXTS = ["the lazy dog", "árvíztűrő  tükörfúrógép\n", "a", "fox " * 50, "<eod> inside <pad>", "日本😀\u0301", ""]

needs_fastokens = pytest.mark.skipif(importlib.util.find_spec("fastokens") is None, reason="needs fastokens")


def test_hf(hf_tokenizer):
    tokenizer = load_tokenizer(hf_tokenizer)
    reference = tokenizers.Tokenizer.from_file(f"{hf_tokenizer}/tokenizer.json")
    assert tokenizer.encode_batch(TEXTS) == [reference.encode(t, add_special_tokens=False).ids for t in TEXTS]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (reference.get_vocab_size(), 1)
    assert tokenizer.sha256 == hashlib.sha256(Path(hf_tokenizer, "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.name == Path(hf_tokenizer).name


def test_sentencepiece(sp_tokenizer):
    tokenizer = load_tokenizer(sp_tokenizer)
    reference = sentencepiece.SentencePieceProcessor(model_file=sp_tokenizer)
    assert tokenizer.encode_batch(TEXTS) == [reference.encode(text) for text in TEXTS]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (reference.vocab_size(), reference.eos_id())
    assert load_tokenizer(str(Path(sp_tokenizer).parent)).sha256 == tokenizer.sha256


def test_what_the_file_would_add_or_cut_is_left_out(hf_tokenizer, tmp_path):
    shutil.copytree(hf_tokenizer, tmp_path, dirs_exist_ok=True)
    edited = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    edited.enable_truncation(2)
    edited.enable_padding(length=8)
    edited.post_processor = tokenizers.processors.TemplateProcessing(
        single="<pad> $A <eod>", special_tokens=[("<pad>", 0), ("<eod>", 1)]
    )
    edited.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode_batch(TEXTS) == load_tokenizer(hf_tokenizer).encode_batch(TEXTS)


@pytest.mark.parametrize("eos_token", ["<pad>", {"content": "<pad>", "special": True}])
def test_eos_token_spellings(hf_tokenizer, tmp_path, eos_token):
    shutil.copy(f"{hf_tokenizer}/tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos_token}))
    assert load_tokenizer(str(tmp_path)).eod_id == 0


def test_mistakes_are_named(hf_tokenizer, tmp_path):
    def refused(message: str):
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path))

    refused("expected tokenizer.json or a SentencePiece .model")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("tokenizer.json is not a Hugging Face tokenizer")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    refused("tokenizer.json has no tokens")
    shutil.copy(f"{hf_tokenizer}/tokenizer.json", tmp_path)
    refused("names no end-of-document token")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    refused("eos_token '<none>' .* is not in the tokenizer's vocabulary")
    (tmp_path / "tokenizer_config.json").write_text("{")
    refused("tokenizer_config.json is not valid JSON")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text("no model")
    refused("tokenizer.model is not a SentencePiece model")
    tmp_path = tmp_path / "nowhere"
    refused("no such folder or file")


@needs_fastokens
@pytest.mark.parametrize("parse", [False, True])
def test_fastokens_makes_the_same_tokens(hf_tokenizer, parse):
    special = SpecialTokens(parse=parse)
    fast = load_tokenizer(hf_tokenizer, engine="fastokens", special=special)
    reference = load_tokenizer(hf_tokenizer, special=special)
    generator = random.Random(0)
    pieces = [*"abc áű日😀\u0301\n\t.,'19", "fox", " quick", "<eod>", "  ", "'re"]
    texts = HARD_TEXTS + ["".join(generator.choices(pieces, k=generator.randrange(1, 40))) for _ in range(2000)]
    ids = [ids.tolist() for ids in fast.encode_batch(texts)]
    assert ids == reference.encode_batch(texts)
    assert any(fast.eod_id in document for document in ids) == parse
    assert (fast.vocab_size, fast.eod_id, fast.sha256) == (
        reference.vocab_size,
        reference.eod_id,
        reference.sha256,
    )


@needs_fastokens
def test_fastokens_makes_the_same_corpus(hf_tokenizer, write_text, tmp_path):
    source = SourceConfig(
        name="hu", files=(write_text("a.jsonl", HARD_TEXTS[:-1] * 9),), language="hu", role="expanded"
    )
    for engine in ("tokenizers", "fastokens"):
        preprocess([source], tokenizer=hf_tokenizer, output=str(tmp_path / engine), engine=engine)
    for name in ("hu.bin", "hu.idx", "manifest.yaml"):
        assert (tmp_path / "tokenizers" / name).read_bytes() == (tmp_path / "fastokens" / name).read_bytes()


@needs_fastokens
def test_a_difference_of_fastokens_is_refused(hf_tokenizer):
    fast = load_tokenizer(hf_tokenizer, engine="fastokens")

    class Wrong:
        def encode_batch_flat(self, texts, add_special_tokens, split_special_tokens):
            return np.array([5] * len(texts), "<u4").tobytes(), np.arange(len(texts) + 1, dtype="<u8").tobytes()

    fast._fast = Wrong()
    with pytest.raises(UserError, match="differ on 'the lazy dog'; use preprocess.engine: tokenizers"):
        fast.encode_batch(HARD_TEXTS)


@needs_fastokens
def test_what_fastokens_cannot_read_is_refused(sp_tokenizer):
    with pytest.raises(UserError, match="fastokens reads a tokenizer.json, not .*toy.model"):
        load_tokenizer(sp_tokenizer, engine="fastokens")
