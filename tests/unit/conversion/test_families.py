"""What is read from a model folder, and what is refused."""

import dataclasses
import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_lpr.conversion.export import to_hf
from megatron_lpr.conversion.families import FAMILIES, family_of, read_architecture
from megatron_lpr.conversion.hf_io import SafetensorsReader
from megatron_lpr.conversion.mappings import QKV, Mapping
from megatron_lpr.conversion.upcycle import load_dense
from megatron_lpr.errors import UserError

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
V4_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def folder(tmp_path, **changes):
    config = {key: value for key, value in {**V4_LLAMA, **changes}.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_version_4_config(tmp_path):
    arch = read_architecture(folder(tmp_path))
    assert (arch.family, arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) == ("llama", 2, 32, 24)
    assert (arch.num_attention_heads, arch.num_query_groups, arch.head_dim, arch.vocab_size) == (4, 2, 8, 60)
    assert (arch.rope_theta, arch.rope_scaling, arch.dtype) == (5e5, None, "bfloat16")
    assert (arch.tie_word_embeddings, arch.qkv_bias, arch.qk_norm) == (False, False, False)
    assert (arch.sliding_window, arch.rms_norm_eps, arch.max_position_embeddings) == (None, 1e-5, 64)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e5, "rope_scaling": LLAMA3_SCALING},
        {"rope_theta": "absent", "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 1e5}},
        {
            "rope_theta": 1e5,
            "rope_scaling": LLAMA3_SCALING,
            "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 1e5},
        },
    ],
    ids=["v4", "v5", "both"],
)
def test_rope_of_either_version_is_the_same(tmp_path, rope):
    arch = read_architecture(folder(tmp_path, **rope))
    assert (arch.rope_theta, arch.rope_scaling) == (1e5, LLAMA3_SCALING)


def test_old_key_of_the_scaling_type(tmp_path):
    old = {"type" if key == "rope_type" else key: value for key, value in LLAMA3_SCALING.items()}
    assert read_architecture(folder(tmp_path, rope_scaling=old)).rope_scaling == LLAMA3_SCALING


def test_absent_fields_have_the_defaults_of_transformers(tmp_path):
    absent = dict.fromkeys(["rope_theta", "rms_norm_eps", "num_key_value_heads", "torch_dtype"], "absent")
    arch = read_architecture(folder(tmp_path, **absent))
    assert (arch.rope_theta, arch.rms_norm_eps, arch.num_query_groups, arch.dtype) == (
        1e4,
        1e-6,
        4,
        "float32",
    )


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.* is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "'linear'.* is not supported"),
        ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 2.0}}, "low_freq_factor.* is not supported"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "contradicts itself"),
        ({"rope_scaling": {**LLAMA3_SCALING, "partial_rotary_factor": 0.5}}, "partial"),
        ({"hidden_size": "absent"}, "hidden_size = None"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window = 4096"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, "sliding_window = 32"),
    ],
)
def test_what_cannot_be_carried_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_architecture(folder(tmp_path, **changes))


def test_missing_folder_and_missing_or_broken_config(tmp_path):
    with pytest.raises(UserError, match="nowhere' does not exist"):
        read_architecture(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no config.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_architecture(tmp_path)


def test_tables_name_exactly_what_transformers_saves(base):
    arch, reader = read_architecture(base), SafetensorsReader(base)
    saved = {name: reader.shape(name) for name in reader.keys()}
    assert family_of(arch).shapes(arch) == saved


def test_a_new_family_is_an_entry_of_the_table(tmp_path, monkeypatch, empty_rank):
    bias = Mapping(
        "self_attention.linear_qkv.bias",
        QKV(),
        {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
    )
    llama = FAMILIES["llama"]
    qwen = dataclasses.replace(
        llama,
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        layer=(*llama.layer, bias),
        required={"hidden_act": "silu", "use_sliding_window": False},
    )
    monkeypatch.setitem(FAMILIES, "qwen2", qwen)
    sizes = {key: V4_LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    arch, reader = read_architecture(tmp_path), SafetensorsReader(tmp_path)
    assert arch.qkv_bias and not arch.qk_norm
    parameters = empty_rank(arch, layers=1, num_frozen=0, num_experts=0)
    parameters["decoder.layers.0.self_attention.linear_qkv.bias"] = torch.full((64,), torch.nan)
    load_dense(parameters.items(), reader, arch)
    exported = dict(to_hf(parameters.items(), arch, num_frozen=0))
    assert exported.keys() == set(reader.keys())
    assert all(torch.equal(exported[name], reader.get(name)) for name in exported)
