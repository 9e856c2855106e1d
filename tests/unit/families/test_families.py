"""What is read from a model folder, and what is refused."""

import json
import shutil

import pytest
from tiny_models import LLAMA3_SCALING
from transformers import AutoConfig

from megatron_lpr.errors import UserError
from megatron_lpr.families import family_of, read_architecture
from megatron_lpr.families.export_config import export_config
from megatron_lpr.families.weights import open_weights

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
QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
}

ERNIE_MOE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 0,
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
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: .*LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "= 'yarn': .* not supported; .*linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor = None: it must be"),
        ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 4.0}}, "low_freq_factor = 4.0: it must be below"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "contradicts itself"),
        ({"rope_scaling": {**LLAMA3_SCALING, "partial_rotary_factor": 0.5}}, "partial"),
        ({"hidden_size": "absent"}, "hidden_size = None"),
        ({"torch_dtype": "float8"}, "torch_dtype = 'float8'; supported"),
        ({"sliding_window": 32}, "sliding_window = 32"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window = 0"),
        ({**QWEN3, "use_sliding_window": True}, "use_sliding_window = True"),
        ({**QWEN3, "layer_types": ["full_attention", "sliding_attention"]}, "layers of several kinds"),
        ({**QWEN3, "attention_bias": True}, "attention_bias = True"),
        ({**QWEN3_MOE, "norm_topk_prob": "absent"}, "norm_topk_prob = False"),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, "another width"),
        ({**QWEN3_MOE, "num_experts": 10**4, "num_hidden_layers": 101}, "at most 1000000 in all 101 layers"),
        ({**QWEN3, "head_dim": 7}, "head_dim = 7: .* even size"),
        ({"hidden_size": 28}, "num_attention_heads = 4: .* even size, not 7"),
        ({**ERNIE_MOE, "moe_layer_interval": 2}, "moe_layer_interval = 2"),
        ({**QWEN3_MOE, "num_experts": "absent"}, "num_experts = None"),
        ({"architectures": ["MixtralForCausalLM"], "router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    ],
)
def test_what_cannot_be_carried_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_architecture(folder(tmp_path, **changes))


def test_missing_folder_and_missing_or_broken_config(tmp_path):
    with pytest.raises(UserError, match="nowhere' does not exist: .*hf download NAME --local-dir FOLDER"):
        read_architecture(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no config.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_architecture(tmp_path)


def test_tables_name_exactly_what_transformers_saves(base):
    arch = read_architecture(base)
    reader = open_weights(base, arch)
    saved = {name: reader.shape(name) for name in reader.keys()}
    assert family_of(arch).shapes(arch) == saved


def test_experts_of_a_model_that_has_them(tmp_path):
    arch = read_architecture(folder(tmp_path, **QWEN3_MOE, mlp_only_layers=None))
    assert (arch.family, arch.num_experts, arch.topk, arch.ffn_hidden_size) == ("qwen3", 4, 2, 8)
    assert arch.mlp_only_layers == () and arch.qk_norm and not arch.qkv_bias
    version_5 = {**QWEN3_MOE, "num_experts": "absent", "num_local_experts": 4}
    assert read_architecture(folder(tmp_path, **version_5)) == arch


def test_as_many_experts_as_a_token_goes_to_and_a_layer_without(tmp_path):
    fields = {**QWEN3_MOE, "num_experts_per_tok": 4, "mlp_only_layers": [1], "intermediate_size": 8}
    arch = read_architecture(folder(tmp_path, **fields))
    assert (arch.num_experts, arch.topk, arch.moe_layers()) == (4, 4, [0])


def test_heads_that_do_not_make_up_the_hidden_size(tmp_path):
    arch = read_architecture(folder(tmp_path, **QWEN3, hidden_size=30, head_dim=16))
    assert (arch.hidden_size, arch.shape("Q")) == (30, (64,))


def test_a_mixtral_is_read_with_its_window(tmp_path):
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "sliding_window": 16}
    arch = read_architecture(folder(tmp_path, **mixtral))
    assert (arch.family, arch.num_experts, arch.topk, arch.sliding_window) == ("mistral", 3, 2, 16)


def test_a_window_that_the_config_leaves_out_is_mistrals(tmp_path):
    assert read_architecture(folder(tmp_path, architectures=["MistralForCausalLM"])).sliding_window == 4096
    layers = {"layer_types": ["sliding_attention"] * 2}
    assert read_architecture(folder(tmp_path, architectures=["MistralForCausalLM"], **layers)).sliding_window == 4096


def test_the_dtype_that_the_config_leaves_out_is_the_one_on_disk(tmp_path, llama_bf16):
    base = shutil.copytree(llama_bf16, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    assert read_architecture(base).dtype == "bfloat16"


def test_of_two_dtypes_that_of_transformers(tmp_path):
    config = folder(tmp_path, model_type="llama", dtype="float32", torch_dtype="bfloat16")
    assert read_architecture(config).dtype == str(AutoConfig.from_pretrained(config).dtype).removeprefix("torch.")


def test_a_dense_export_in_another_dtype_says_so_to_transformers_4_and_5(tmp_path):
    arch = read_architecture(folder(tmp_path))
    written = export_config(arch, V4_LLAMA, num_experts=0, topk=0, dtype="float32")
    assert written["torch_dtype"] == written["dtype"] == "float32"
