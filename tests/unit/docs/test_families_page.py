"""docs/families.md: its code runs, its family is the one that is used, and a language model is taken out of one."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, stock_logits, tokens_BS
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from megatron_lpr.errors import UserError
from megatron_lpr.families import FAMILIES, read_architecture
from megatron_lpr.testing.toy_models import write_toy_tokenizer

NAME = "models/Mistral-Small-3.2-24B-Instruct-2506"
PAGE = Path(__file__).resolve().parents[3] / "docs/families.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_family_of_the_page():
    namespace = {}
    exec(blocks()[1], namespace)
    exec(blocks()[2], namespace)
    assert namespace["SEED_OSS"] == FAMILIES["seed_oss"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_in_a_larger_one(tmp_path, monkeypatch, tied):
    monkeypatch.chdir(tmp_path)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={**SIZES, "model_type": "mistral", "head_dim": 8, "pad_token_id": None},
        vision_config={**tower, "model_type": "pixtral", "head_dim": 8, "image_size": 16, "patch_size": 8},
        image_token_index=59,
        tie_word_embeddings=tied,
    )
    whole, folder = Mistral3ForConditionalGeneration(config).eval(), Path(NAME)
    whole.save_pretrained(folder)
    write_toy_tokenizer(folder)
    with pytest.raises(UserError, match="save that alone"):
        read_architecture(folder)
    namespace = {}
    exec(blocks()[0], namespace)
    tokens = tokens_BS().clamp(max=58)
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
    assert read_architecture(namespace["out"]).tie_word_embeddings == tied
    torch.testing.assert_close(stock_logits(Path(namespace["out"]), tokens), expected, rtol=0, atol=1e-6)


def test_the_table_of_the_page_is_the_table_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (\w+)[^|]*\| (\w*) *\| (\w+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: (dense, out) for name, dense, _, out in rows} == {
        family.name: (family.dense.architecture, family.moe.architecture) for family in FAMILIES.values()
    }
    read_as = {}
    for family in FAMILIES.values():
        read_as.setdefault(family.moe.architecture, family.name)
    assert {again: name for name, _, again, _ in rows if again} == read_as
