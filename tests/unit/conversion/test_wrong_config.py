"""A config.json with values that are not numbers, or not those of a model: a sentence with the file and the field."""

import copy
import json

import pytest

from megatron_lpr.conversion.export import export
from megatron_lpr.conversion.export.export import upcycle_hf
from megatron_lpr.conversion.verify.folder import stock_shapes
from megatron_lpr.errors import UserError
from megatron_lpr.families import FAMILIES, read_architecture
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.testing.toy_models import write_toy_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "dtype": "float32",
    "head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "shared_expert_intermediate_size": 8,
    "mlp_only_layers": [],
    # ERNIE's names
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 0,
}
ERNIE = "Ernie4_5_MoeForCausalLM"
CLASSES = {
    hf_class.architecture: SIZES
    | (EXPERTS if hf_class is family.moe else {})
    | {"architectures": [hf_class.architecture]}
    for family in FAMILIES.values()
    for hf_class in (family.dense, family.moe)
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
NO_SIZE = [0, -1, 1.5, 32.0, "32", "many", [], [32], {}, True, float("nan"), float("inf"), 10**9, 10**400]
NO_NUMBER = ["1e4", "", [], [1e4], {}, True, 0, -1.0, float("nan"), float("inf"), 10**400]
WRONG = {
    **{
        name: NO_SIZE
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "num_key_value_heads",
            "head_dim",
        )
    },
    "max_position_embeddings": [value for value in NO_SIZE if value != 10**9],
    "rms_norm_eps": [None, *NO_NUMBER],
    "tie_word_embeddings": ["false", 0, 1, [], "null"],
    "rope_theta": NO_NUMBER,
    "rope_scaling": ["linear", [], 2, True, {"full_attention": LINEAR}, {"type": "yarn"}, {"rope_type": ["linear"]}],
    "rope_parameters": ["x", [LINEAR], {"rope_theta": "x"}, {"partial_rotary_factor": "x"}, {"rope_type": None}],
    "partial_rotary_factor": [0.5, "1", []],
    "architectures": [None, "LlamaForCausalLM", [], [None], [["LlamaForCausalLM"]], {}, 5],
    "dtype": [["float32"], {"a": 1}, 32, True, "int8", "torch.float32"],
    "layer_types": ["full_attention", 3, [["full_attention"]], [{}], {"a": "b"}],
    "hidden_act": [5, ["silu"], {}],
}
WRONG_EXPERTS = {
    "num_experts_per_tok": [*NO_SIZE, 5],
    "moe_k": [*NO_SIZE, 5],
    "mlp_only_layers": ["0", [-1], [2], [0.0], ["0"], [True], {"0": 1}, 1, [0, 1]],
    "shared_expert_intermediate_size": [-1, "8", [], 1.5, None, True],
    "norm_topk_prob": ["true", None, []],
    "moe_intermediate_size": NO_SIZE,
}


def table():
    for architecture, config in CLASSES.items():
        fields = dict(WRONG)
        if "num_experts" in config:
            count = {"MixtralForCausalLM": "num_local_experts", ERNIE: "moe_num_experts"}
            fields[count.get(architecture, "num_experts")] = [*NO_SIZE, 10**6]
            fields |= {name: WRONG_EXPERTS[name] for name in WRONG_EXPERTS if read_by(architecture, name)}
        if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
            fields["sliding_window"] = NO_SIZE
        if "moe_intermediate_size" not in fields:
            fields["intermediate_size"] = NO_SIZE
        for name, values in fields.items():
            for value in values:
                yield architecture, name, value


def read_by(architecture, name):
    if name in ("moe_k", "num_experts_per_tok"):
        return (name == "moe_k") == (architecture == ERNIE)
    if architecture == ERNIE:
        return name == "moe_intermediate_size"
    if name == "shared_expert_intermediate_size":
        return architecture == "Qwen2MoeForCausalLM"
    if architecture == "FlexOlmoForCausalLM":
        return name == "norm_topk_prob"
    return architecture != "MixtralForCausalLM"


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_table_starts_from_a_good_config(tmp_path, architecture):
    assert read(tmp_path, CLASSES[architecture]).num_layers == 2


def test_every_wrong_value_is_a_sentence(tmp_path):
    """2,000 of them; all are tried, and those that passed or ended in another error are listed."""
    failures = []
    for architecture, name, value in table():
        try:
            read(tmp_path, copy.deepcopy(CLASSES[architecture]) | {name: value})
            failures.append((architecture, name, str(value)[:50], "accepted"))
        except UserError as error:
            told = str(error)
            if str(tmp_path) not in told or name not in told or "\n" in told or len(told) > 500:
                failures.append((architecture, name, str(value)[:50], told[:300]))
        except Exception as error:
            failures.append((architecture, name, str(value)[:50], repr(error)[:300]))
    assert not failures, "\n".join(map(str, failures))


CARRIED = {
    "bos_token_id": ["x", [], [1], {}, True, 1.5, float("nan"), 10**400],
    "eos_token_id": ["x", {}, ["x"], True, 1.5, float("nan"), 10**400],
    "pad_token_id": ["x", [1], {}, True, 1.5, 257, 10**400],
    "initializer_range": [None, "x", [], True, 0, -0.5, float("nan"), 10**400],
    "attention_dropout": [None, "x", [], True, -1, float("nan"), 10**400],
    "use_cache": [None, "x", [], 1, 0, {}],
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_an_export_carries_over_is_checked_before_the_work(tmp_path, name, monkeypatch):
    """transformers would not read it, which showed only when everything had been written."""
    monkeypatch.setattr(export, "complete_folder", None)
    base = write_toy_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for value in CARRIED[name]:
        (base / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=f"base/config.json' has {name} = .*: it must be "):
            upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3))


def test_whatever_transformers_makes_of_a_config_is_a_sentence(tmp_path):
    base = write_toy_model(tmp_path / "base", initializer_range="x")
    with pytest.raises(UserError, match="transformers cannot read '.*initializer_range") as told:
        stock_shapes(base)
    assert "\n" not in str(told.value)


def test_more_experts_than_there_can_be(tmp_path):
    base = write_toy_model(tmp_path / "base")
    with pytest.raises(UserError, match="1000000000 experts in 2 layers: a model can have 1000000 in all"):
        upcycle_hf(base, tmp_path / "out", Expansion(num_experts=10**9))


def test_a_config_that_is_no_json(tmp_path):
    for text in ("[" * 100_000, "{", "\xff", '{"hidden_size": ' + "9" * 5000 + "}", "[]", "null"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="config.json' is not (valid JSON|a JSON object)"):
            read_architecture(tmp_path)
