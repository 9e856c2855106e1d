"""There and back through the doors of tools/convert_hf.py: no weight is lost or changed on the way."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY, save_tiny

from megatron_lpr import cli
from megatron_lpr.testing.toy_models import write_toy_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_hf.py"


@pytest.fixture(scope="module")
def convert_hf():
    spec = importlib.util.spec_from_file_location("convert_hf", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("model") / "base", dtype="bfloat16")


def test_dense_model_to_megatron_and_back(convert_hf, base, tmp_path):
    assert convert_hf("hf-to-megatron", base, tmp_path / "megatron") == 0
    assert convert_hf("megatron-to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == torch.bfloat16 and torch.equal(after[name], tensor), name


def test_upcycling_through_megatron_is_upcycling_without(convert_hf, base, tmp_path):
    options = ["--num-experts", 4, "--num-frozen", 2, "--router-std", 0.5, "--seed", 9]
    assert convert_hf("hf-to-megatron", base, tmp_path / "megatron", *options) == 0
    assert convert_hf("megatron-to-hf", tmp_path / "megatron", tmp_path / "one") == 0
    assert convert_hf("hf-to-hf", base, tmp_path / "other", *options) == 0
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file
    assert cli.main(["verify", str(tmp_path / "one"), "--base", str(base)]) == 0


def same_model(one, other):
    files = ("model.safetensors", "config.json")
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.mark.parametrize("family", TINY)
def test_every_family_through_megatron_and_without(convert_hf, tmp_path, family):
    """Upcycled, as it is, and expanded again; a Qwen with a layer that keeps its dense FFN."""

    def both_ways(source, name, *options):
        assert convert_hf("hf-to-megatron", source, tmp_path / f"megatron_{name}", *options) == 0
        assert convert_hf("megatron-to-hf", tmp_path / f"megatron_{name}", tmp_path / name) == 0
        assert convert_hf("hf-to-hf", source, tmp_path / f"{name}_offline", *options) == 0
        assert same_model(tmp_path / name, tmp_path / f"{name}_offline")
        return tmp_path / name

    base = save_tiny(family, tmp_path / "base")
    dense_layers = ["--mlp-only-layers", 0] if family.startswith("qwen") else []
    once = both_ways(base, "once", "--num-experts", 4, "--router-std", 0.5, *dense_layers)
    assert convert_hf("hf-to-megatron", once, tmp_path / "megatron") == 0
    assert convert_hf("megatron-to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    assert same_model(once, tmp_path / "back")
    both_ways(once, "twice", "--num-experts", 6, "--num-frozen", 4)


def test_a_checkpoint_in_the_way(convert_hf, base, tmp_path, capsys):
    assert convert_hf("hf-to-megatron", base, tmp_path / "megatron") == 0
    capsys.readouterr()
    assert convert_hf("hf-to-megatron", base, tmp_path / "megatron") == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
