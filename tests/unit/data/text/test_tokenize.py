"""Both kinds of tokenizer files behind one face."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError

TEXTS = ["the lazy dog", "árvíz", "a", "fox " * 50]


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
