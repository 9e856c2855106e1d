"""The toy models are models: stock transformers reads them, and their recipes are recipes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.recipe.reading import load_recipe
from megatron_lpr.testing.toy_models import LETTERS, write_toy_model, write_toy_project, write_toy_text


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_model(tmp_path, tied):
    base = write_toy_model(tmp_path / "base", dtype="bfloat16", tie_word_embeddings=tied)
    model, loading = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True, dtype="auto")
    assert model.dtype == torch.bfloat16 and not any(loading.values())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_tokenizers_agree_and_lose_nothing(tmp_path):
    base = write_toy_model(tmp_path / "base")
    text = "árvíz  tükör\n\tfúró €"
    ours, stock = load_tokenizer(str(base)), AutoTokenizer.from_pretrained(base)
    [ids] = ours.encode_batch([text])
    assert ids == stock.encode(text) and len(ids) == len(text.encode()) and stock.decode(ids) == text
    assert ours.vocab_size == 257 and ours.eod_id == stock.eos_token_id == 0


def test_same_seed_same_files(tmp_path):
    one, same, other = (write_toy_model(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    content = [(folder / "model.safetensors").read_bytes() for folder in (one, same, other)]
    assert content[0] == content[1] != content[2]


@pytest.mark.parametrize("language", LETTERS)
def test_text_is_of_its_language(tmp_path, language):
    lines = write_toy_text(tmp_path / "x.jsonl", language, documents=7).read_text().splitlines()
    assert len(lines) == 7
    assert {letter for line in lines for letter in json.loads(line)["text"]} <= set(LETTERS[language]) | {" "}


def test_recipes_are_read(tmp_path):
    recipes = write_toy_project(tmp_path, seed=3)
    assert recipes.keys() == {"upcycle", "stage1", "stage2", "dense", "moe_full", "review_without_lpr"}
    for path in recipes.values():
        recipe = load_recipe(str(path))
        assert all((tmp_path / "text" / f"{corpus.name}.jsonl").is_file() for corpus in recipe.preprocess.corpora)


def test_a_model_that_has_experts(tmp_path):
    folder = write_toy_model(
        tmp_path / "moe",
        architectures=["Qwen2MoeForCausalLM"],
        model_type="qwen2_moe",
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=8,
        norm_topk_prob=True,
    )
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not model.model.layers[1].mlp.shared_expert.down_proj.weight.any()
