"""A Hugging Face folder as a model to evaluate."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.hf_model import hf_nll_fn
from megatron_lpr.files import safetensors_io


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_nll_is_minus_log_probability_of_the_label(folder):
    tokens_BS = torch.randint(32, (3, 5), generator=torch.Generator().manual_seed(1))
    labels_BS = torch.randint(32, (3, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        p_BSV = LlamaForCausalLM.from_pretrained(folder)(tokens_BS).logits.softmax(-1)
    expected_BS = -p_BSV.gather(-1, labels_BS[..., None])[..., 0].log()
    torch.testing.assert_close(hf_nll_fn(str(folder))(tokens_BS, labels_BS), expected_BS)


def test_bfloat16_model_returns_fp32_losses(folder):
    nll_BS = hf_nll_fn(str(folder), dtype="bfloat16")(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4).long())
    assert nll_BS.dtype == torch.float32


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    with pytest.raises(UserError, match="its tokenizer makes token 32, but it has embeddings of 32"):
        hf_nll_fn(str(folder))(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 32))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder with a config.json"):
        hf_nll_fn(str(tmp_path / "nowhere"))


def test_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="transformers cannot load it"):
        hf_nll_fn(str(tmp_path))


def test_a_file_cut_off_or_without_the_right_to_read_it_is_named(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=r"cut/model.safetensors' is damaged or truncated .*: download it again"):
        hf_nll_fn(str(tmp_path / "cut"))

    def no_right(path, *arguments, **options):
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(safetensors_io, "open", no_right, raising=False)
    with pytest.raises(PermissionError, match="cut/model.safetensors"):  # a sentence of the command line
        hf_nll_fn(str(tmp_path / "cut"))


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_damaged_weights_are_refused(folder, tmp_path, damage):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if damage == "misshapen":
        tensors[name] = tensor[:3].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        hf_nll_fn(str(tmp_path))


def test_code_of_the_folder_is_neither_run_nor_asked_for(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "foreign")
    config = tmp_path / "foreign/config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    (tmp_path / "foreign/own.py").write_text("raise SystemExit('run')")
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with pytest.raises(UserError, match="transformers cannot load it"):
        hf_nll_fn(str(tmp_path / "foreign"))
    assert not asked
