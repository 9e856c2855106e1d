"""The folder for llama.cpp is Mixtral with biases, and computes what the Qwen2-MoE export computes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import rewrite, save_tiny, stock_logits, tokens_BS, train_a_little
from transformers import MixtralForCausalLM

from megatron_lpr.conversion.export.export import upcycle_hf
from megatron_lpr.conversion.export.for_llama_cpp import write_for_llama_cpp
from megatron_lpr.errors import UserError
from megatron_lpr.families.expansion import Expansion


def exported(name, root, **expansion):
    """With experts that differ and routers with opinions."""
    base = save_tiny(name, root / "base")
    return rewrite(upcycle_hf(base, root / "export", Expansion(num_experts=4, **expansion)), train_a_little)


@torch.no_grad()
def mixtral_logits(folder):
    """By the stock Mixtral, whose q, k and v are given the biases that it drops."""
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    biases = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "bias" in name}
    for name, bias in biases.items():
        model.get_submodule(name.removesuffix(".bias")).bias = torch.nn.Parameter(bias)
    assert len(biases) == 3 * model.config.num_hidden_layers
    return model(tokens_BS()).logits


@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied"])
def test_same_function_as_mixtral_with_biases(name, tmp_path):
    export = exported(name, tmp_path)
    folder = write_for_llama_cpp(export, tmp_path / "out")
    torch.testing.assert_close(mixtral_logits(folder), stock_logits(export), rtol=0, atol=1e-5)
    assert not any("shared_expert" in key for key in load_file(folder / "model.safetensors"))
    assert (folder / "tokenizer.json").read_bytes() == (export / "tokenizer.json").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    # fields that convert_hf_to_gguf.py reads
    told = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    assert told.items() <= config.items() and "transformers" in (folder / "README.md").read_text()


def test_what_llama_cpp_reads_as_it_is_or_cannot_hold_is_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="give it to convert_hf_to_gguf.py as it is"):
        write_for_llama_cpp(exported("qwen3", tmp_path / "qwen3"), out)
    with pytest.raises(UserError, match=r"layers without experts \(1\)"):
        write_for_llama_cpp(exported("qwen2", tmp_path / "layers", mlp_only_layers=(1,)), out)
    shared = "model.layers.0.mlp.shared_expert.down_proj.weight"
    trained = rewrite(exported("qwen2", tmp_path / "shared"), lambda tensors: tensors[shared].fill_(1))
    with pytest.raises(UserError, match="not zero"):
        write_for_llama_cpp(trained, out)
    assert not out.exists()


def test_a_dry_run_writes_nothing(tmp_path):
    assert not write_for_llama_cpp(exported("qwen2", tmp_path), tmp_path / "out", dry_run=True).exists()
