"""What transformers would pick up beside the tensors is found: files, fields of config.json, shards elsewhere."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import rewrite_config, save_tiny

from megatron_lpr.conversion.export.export import upcycle_hf
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.errors import UserError
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.recipe.settings import ExportConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("base") / "base")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def export(base, tmp_path_factory):
    """In several shards."""
    return upcycle_hf(
        base,
        tmp_path_factory.mktemp("export") / "out",
        Expansion(num_experts=3),
        settings=ExportConfig(max_shard_size="40KB"),
    )


@pytest.fixture
def copy(export, tmp_path):
    return shutil.copytree(export, tmp_path / "copy")


def failed(report):
    return {check.name for check in report.checks if not check.ok}


def test_it_passes_as_it_is_and_with_what_people_add(copy, base):
    for name in (".gitattributes", "LICENSE", "NOTICE.txt", "plot.png", "EVALUATION.md"):
        (copy / name).touch()
    (copy / ".cache").mkdir()
    rewrite_config(copy, _name_or_path="me/model", transformers_version="5.0")
    report = verify_export(copy, base)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"attn_implementation": "eager"},
        {"router_jitter_noise": 0.5},
        {"tie_word_embeddings": 0},
        {"base_model_tp_plan": None},
    ],
)
def test_a_field_that_no_export_has_or_has_otherwise(copy, base, fields):
    report = verify_export(rewrite_config(copy, **fields), base)
    assert "config" in failed(report) and next(iter(fields)) in str(report)


@pytest.mark.parametrize(
    "name",
    [
        "special_tokens_map.json", "added_tokens.json", "chat_template.json", "generation_config.json.bak",
        "pytorch_model.bin", "model-00009-of-00009.safetensors", "adapter_config.json", "adapter_model.safetensors",
        "modeling_llama.py", "tokenizer.model", "vocab.txt", "preprocessor_config.json", "tf_model.h5",
    ],
)  # fmt: skip
def test_a_file_that_the_base_has_not(copy, base, name):
    (copy / name).write_text("{}")
    report = verify_export(copy, base)
    assert failed(report) == {"files"} and name in str(report)


def test_a_folder_of_templates(copy, base):
    (copy / "additional_chat_templates").mkdir()
    assert failed(verify_export(copy, base)) == {"files"}


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_altered_chat_template(copy, base, name):
    (copy / name).write_text((copy / name).read_text().replace("messages", "messages + evil"))
    report = verify_export(copy, base)
    assert failed(report) == {"files"} and name in str(report)


def test_a_file_of_the_base_that_is_missing(copy, base):
    (copy / "tokenizer_config.json").unlink()
    report = verify_export(copy, base)
    assert failed(report) == {"files"} and "missing or different: tokenizer_config.json" in str(report)


def test_a_shard_elsewhere(copy, base):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    shutil.copy(copy / shard, copy.parent / "elsewhere.safetensors")
    index["weight_map"] = {
        name: "../elsewhere.safetensors" if file == shard else file for name, file in index["weight_map"].items()
    }
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names '\.\./elsewhere.safetensors': a shard is a .safetensors file inside"):
        verify_export(copy, base)


def test_two_models_in_one_folder(copy, base, tmp_path):
    upcycle_hf(base, tmp_path / "single", Expansion(num_experts=3, router_seed=9))
    shutil.copy(tmp_path / "single/model.safetensors", copy)
    with pytest.raises(UserError, match="holds two models, model.safetensors, which transformers reads"):
        verify_export(copy, base)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "not.in.the.index"])
def test_a_second_copy_of_a_tensor_in_another_shard(copy, base, name):
    """transformers reads every tensor of every shard, whatever the index says."""
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    shard = next(file for file in sorted(set(index.values())) if index.get(name) != file)
    tensors = load_file(copy / shard)
    save_file({**tensors, name: torch.ones(32)}, copy / shard, metadata={"format": "pt"})
    report = verify_export(copy, base)
    assert "tensors" in failed(report) and name in str(report)


def test_a_model_that_is_not_the_one_it_was_made_of(copy, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    rewrite_config(other, use_cache=False)
    report = verify_export(copy, other)
    assert "record" in failed(report) and "config.json differ" in str(report)
