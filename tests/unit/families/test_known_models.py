"""Models as they are published: which are read, with how many parameters, and in which sentence others are refused."""

import json
import math

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from megatron_lpr.errors import UserError
from megatron_lpr.families import FAMILIES, family_of, read_architecture
from megatron_lpr.families.export_config import CARRIED_OVER, export_config
from megatron_lpr.families.table import FIELDS

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
PHI = {
    **LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "rope_scaling": None, "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
}  # fmt: skip
SEED = {
    **LLAMA, "architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "attention_bias": True, "head_dim": 128,
    "attention_out_bias": False, "mlp_bias": False, "residual_dropout": 0.1, "rope_scaling": {"rope_type": "default"},
}  # fmt: skip
ERNIE = {
    **LLAMA, "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "use_bias": False, "head_dim": 128,
}  # fmt: skip
OLMO = {**LLAMA, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False}
PHI_4 = (5120, 17920, 40, 40, 10)
PHI_4_MINI = (3072, 8192, 32, 24, 8)
# sizes, other fields, family, parameters as published
READ = {
    "Yi-6B": ((4096, 11008, 32, 32, 4), {**LLAMA, "vocab_size": 64000}, "llama", 6_061_035_520),
    "DeepSeek-LLM-7B": ((4096, 11008, 30, 32, 32), {**LLAMA, "vocab_size": 102400}, "llama", 6_910_365_696),
    "SmolLM2-1.7B": (
        (2048, 8192, 24, 32, 32), {**LLAMA, "vocab_size": 49152, "tie_word_embeddings": True}, "llama", 1_711_376_384,
    ),
    "TinyLlama": ((2048, 5632, 22, 32, 4), {**LLAMA, "vocab_size": 32000}, "llama", 1_100_048_384),
    "Falcon3-7B": ((3072, 23040, 28, 12, 4), {**LLAMA, "vocab_size": 131072, "head_dim": 256}, "llama", 7_455_550_464),
    "Mistral-Nemo": (
        (5120, 14336, 40, 32, 8), {**MISTRAL, "vocab_size": 131072, "head_dim": 128}, "mistral", 12_247_782_400,
    ),
    "phi-4": (PHI_4, {**PHI, "vocab_size": 100352, "rope_theta": 25e4}, "phi3", 14_659_507_200),
    "Phi-3-mini-4k": (
        (3072, 8192, 32, 32, 32), {**PHI, "vocab_size": 32064, "sliding_window": 2047}, "phi3", 3_821_079_552,
    ),
    "ERNIE-4.5-0.3B": (
        (1024, 3072, 18, 16, 2), {**ERNIE, "vocab_size": 103424, "tie_word_embeddings": True}, "ernie4_5", 360_748_032,
    ),
    "OLMo-2-7B": (
        (4096, 11008, 32, 32, 32), {**OLMO, "vocab_size": 100352, "rope_theta": 5e5}, "olmo2", 7_298_617_344,
    ),
    "Seed-OSS-36B": ((5120, 27648, 64, 80, 8), {**SEED, "vocab_size": 155136}, "seed_oss", 36_151_104_512),
}  # fmt: skip
REFUSED = {
    "Phi-4-mini": (
        PHI_4_MINI,
        {**PHI, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
        "partial_rotary_factor = 0.75: it must be 1",
    ),
    "Phi-3-mini-128k": (PHI_4, {**PHI, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "= 'longrope'"),
    "Phi-3-mini-128k of old": (PHI_4, {**PHI, "rope_scaling": {"type": "su", "long_factor": [1.0]}}, "= 'su'"),
    "Granite-code-8B": (PHI_4, {**LLAMA, "attention_bias": True, "mlp_bias": True}, "attention_bias = True"),
    "a Phi with biases": (PHI_4, {**PHI, "attention_bias": True}, "attention_bias = True"),
    "a Seed-OSS without": (PHI_4, {**SEED, "attention_bias": False}, "attention_bias = False"),
    "InternLM3 as transformers saves it": (PHI_4, {**LLAMA, "model_type": "internlm3"}, "model_type = 'internlm3'"),
    "Gemma-2-9B": (PHI_4, {"architectures": ["Gemma2ForCausalLM"]}, "whose norms add 1 to their weights"),
    "OLMo-3-7B": (PHI_4, {"architectures": ["Olmo3ForCausalLM"]}, "only some of whose layers have a sliding window"),
    "SmolLM3-3B": (PHI_4, {"architectures": ["SmolLM3ForCausalLM"]}, "layers without RoPE, so that it cannot be"),
    "Granite-3.3-8B": (PHI_4, {"architectures": ["GraniteForCausalLM"]}, "multiplies embeddings"),
    "GPT-2": (
        PHI_4,
        {"architectures": ["GPT2LMHeadModel"]},
        "which is not supported; supported: Ernie4_5ForCausalLM, ",
    ),
    "Mistral-Small-3.1-24B": (
        (),
        {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral"}},
        "'mistral': save that alone, as docs/families.md shows",
    ),
    "Qwen2.5-VL-7B": (
        (),
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": {"model_type": "qwen2_5_vl_text"}},
        "model_type 'qwen2_5_vl_text', which is not supported; supported: Ernie4_5ForCausalLM, ",
    ),
}


def folder(tmp_path, sizes, fields):
    common = {"max_position_embeddings": 4096, "vocab_size": 1000, "torch_dtype": "bfloat16"}
    config = {**common, **dict(zip(SIZES, sizes, strict=bool(sizes))), **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", READ)
def test_read_with_all_of_its_parameters(tmp_path, name):
    sizes, fields, family, parameters = READ[name]
    arch = read_architecture(folder(tmp_path, sizes, fields))
    assert arch.family == family and arch.sliding_window == fields.get("sliding_window")
    assert sum(map(math.prod, family_of(arch).shapes(arch).values())) == parameters


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_its_reason(tmp_path, name):
    sizes, fields, reason = REFUSED[name]
    with pytest.raises(UserError) as raised:
        read_architecture(folder(tmp_path, sizes, fields))
    assert reason in str(raised.value)


@pytest.mark.slow
def test_every_class_that_transformers_has(tmp_path):
    """With its own defaults: those of the families are read, no other."""
    read = {each.model_type: each for family in FAMILIES.values() for each in (family.dense, family.moe)}
    classes = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert read.keys() < classes.keys()
    for model_type, architecture in classes.items():
        try:
            config = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # some classes have no defaults
            continue
        needed = read[model_type].required if model_type in read else {}
        fields = {**config, **needed, "architectures": [architecture]}
        (tmp_path / "config.json").write_text(json.dumps(fields, default=str))
        if model_type in read:
            assert read_architecture(tmp_path).num_layers == config["num_hidden_layers"]
            continue
        with pytest.raises(UserError) as refused:
            read_architecture(tmp_path)
        assert architecture in str(refused.value) and "\n" not in str(refused.value)


CLASSES = {each.model_type: each for family in FAMILIES.values() for each in (family.dense, family.moe)}
# What no config may leave out: every default number of query groups divides these heads.
LEAST = {
    "hidden_size": 1280, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 160, "vocab_size": 10**6,
}  # fmt: skip
LEAST_OF = {"qwen2_moe": {"shared_expert_intermediate_size": 8}, "qwen3_moe": {"num_experts": 8}}


@pytest.mark.parametrize("model_type", CLASSES)
def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path, model_type):
    hf_class = CLASSES[model_type]
    least = {**LEAST, **LEAST_OF.get(model_type, {})}
    taken = CONFIG_MAPPING[model_type](**least)
    refused = [name for name, value in hf_class.required.items() if getattr(taken, name, value) != value]
    read = {**least, "architectures": [hf_class.architecture], "model_type": model_type}
    if refused:
        (tmp_path / "config.json").write_text(json.dumps(read))
        with pytest.raises(UserError, match=refused[0]):
            read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(read | {name: hf_class.required[name] for name in refused}))
    arch = read_architecture(tmp_path)
    assert arch.rope_theta == taken.rope_parameters["rope_theta"]
    assert arch.head_dim == (getattr(taken, "head_dim", None) or 8)
    for attribute, names in {**FIELDS, **hf_class.fields}.items():
        if attribute != "head_dim":
            expected = next(getattr(taken, name) for name in names if hasattr(taken, name))
            assert getattr(arch, attribute) == (() if expected == [] else expected), attribute


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_a_config_leaves_out_is_the_same_in_the_export(tmp_path, family):
    """Special tokens and dropout have other defaults in many a class with experts."""
    sizes = dict(zip(SIZES, (32, 24, 2, 4, 2), strict=True))
    dense = {"architectures": [family.dense.architecture], "model_type": family.dense.model_type, "vocab_size": 10**6}
    needed = {key: value for key, value in family.dense.required.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps({**needed, **dense, **sizes}))
    export = export_config(
        read_architecture(tmp_path), {**needed, **dense, **sizes}, num_experts=4, topk=2, dtype="bfloat16"
    )
    taken, exported = (
        CONFIG_MAPPING[fields["model_type"]](**{key: fields[key] for key in fields if key != "model_type"})
        for fields in ({**dense, **sizes}, export)
    )
    for name in CARRIED_OVER:
        assert getattr(exported, name, None) == getattr(taken, name, None) or not hasattr(exported, name), name
