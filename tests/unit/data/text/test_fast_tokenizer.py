"""fastokens in the place of Hugging Face's library: the same tokens, or a refusal."""

import random

import numpy as np
import pytest

from megatron_lpr.data.preprocess.preprocess import preprocess
from megatron_lpr.data.text.special_tokens import SpecialTokens
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import SourceConfig

pytest.importorskip("fastokens")
TEXTS = ["the lazy dog", "árvíztűrő  tükörfúrógép\n", "a", "fox " * 50, "<eod> inside <pad>", "日本😀\u0301", ""]


@pytest.mark.parametrize("parse", [False, True])
def test_same_tokens(hf_tokenizer, parse):
    special = SpecialTokens(parse=parse)
    fast = load_tokenizer(hf_tokenizer, engine="fastokens", special=special)
    reference = load_tokenizer(hf_tokenizer, special=special)
    generator = random.Random(0)
    pieces = [*"abc áű日😀\u0301\n\t.,'19", "fox", " quick", "<eod>", "  ", "'re"]
    texts = TEXTS + ["".join(generator.choices(pieces, k=generator.randrange(1, 40))) for _ in range(2000)]
    ids = [ids.tolist() for ids in fast.encode_batch(texts)]
    assert ids == reference.encode_batch(texts)
    assert any(fast.eod_id in document for document in ids) == parse
    assert (fast.vocab_size, fast.eod_id, fast.sha256) == (
        reference.vocab_size,
        reference.eod_id,
        reference.sha256,
    )


def test_same_corpus(hf_tokenizer, write_text, tmp_path):
    source = SourceConfig(name="hu", files=(write_text("a.jsonl", TEXTS[:-1] * 9),), language="hu", role="expanded")
    for engine in ("tokenizers", "fastokens"):
        preprocess([source], tokenizer_dir=hf_tokenizer, output_dir=str(tmp_path / engine), engine=engine)
    for name in ("hu.bin", "hu.idx", "manifest.yaml"):
        assert (tmp_path / "tokenizers" / name).read_bytes() == (tmp_path / "fastokens" / name).read_bytes()


def test_a_difference_is_refused(hf_tokenizer):
    fast = load_tokenizer(hf_tokenizer, engine="fastokens")

    class Wrong:
        def encode_batch_flat(self, texts, add_special_tokens, split_special_tokens):
            return np.array([5] * len(texts), "<u4").tobytes(), np.arange(len(texts) + 1, dtype="<u8").tobytes()

    fast._fast = Wrong()
    with pytest.raises(UserError, match="differ on 'the lazy dog'; use preprocess.engine: tokenizers"):
        fast.encode_batch(TEXTS)


def test_what_it_cannot_read_is_refused(sp_tokenizer):
    with pytest.raises(UserError, match="fastokens reads a tokenizer.json, not .*toy.model"):
        load_tokenizer(sp_tokenizer, engine="fastokens")
