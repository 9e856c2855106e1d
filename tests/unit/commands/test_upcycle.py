"""`megatron-lpr upcycle --hf`: the Hugging Face folder that an export of the checkpoint would be."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_lpr import cli
from megatron_lpr.conversion.export.export import upcycle_hf
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.testing.toy_models import write_recipe


@pytest.fixture
def recipe(toy_base, tmp_path):
    model = {"base": str(toy_base), "num_experts": 4, "num_frozen_experts": 2, "router_init_std": 0.5, "topk": 3}
    tree = {"name": "x", "output": str(tmp_path / "run"), "model": model}
    return str(write_recipe(tmp_path / "recipe.yaml", tree))


def test_it_is_the_upcycled_base(recipe, toy_base, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["upcycle", recipe, "--hf", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out == f"would write {out}\n" and not out.exists()
    assert cli.main(["upcycle", recipe, "--hf", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "frozen tensors" in printed and "FAIL" not in printed and not (tmp_path / "run").exists()
    assert f"megatron-lpr upcycle {recipe} --hf {out}" in (out / "README.md").read_text()
    upcycle_hf(toy_base, tmp_path / "same", Expansion(num_experts=4, num_frozen=2, topk=3, router_std=0.5))
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "same" / file).read_bytes()


def test_dtype_is_that_of_the_model_or_of_the_export(recipe, tmp_path):
    for number, (setting, dtype) in enumerate(
        (("model.dtype=bfloat16", torch.bfloat16), ("export.dtype=float16", torch.float16))
    ):
        out = tmp_path / str(number)
        assert cli.main(["upcycle", recipe, "--hf", str(out), "--set", setting]) == 0
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
        assert json.loads((out / "config.json").read_text())["num_local_experts"] == 4


def test_settings_that_upcycling_does_not_read(recipe, tmp_path, capsys):
    settings = ["--set", "model.load=elsewhere", "--set", "parallel.expert=2"]
    assert cli.main(["upcycle", recipe, "--hf", str(tmp_path / "out"), "--dry-run", *settings]) == 0
    told = capsys.readouterr().err
    assert "warning: --set parallel.expert=2: has no effect here, where model, export of the recipe are read" in told
    assert "warning: model.load: elsewhere has no effect here: what is upcycled is model.base" in told


def test_without_experts(recipe, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["upcycle", recipe, "--hf", out, "--set", "model.num_experts=0"]) == 2
    assert "model.num_experts: 0; upcycling needs at least 2 experts" in capsys.readouterr().err
