"""The same function before and after: dense and upcycled at step 0, Megatron and the export after training."""

import json
import re
import shutil

import pytest
import torch
from harness import make_batch, upcycle_base
from tiny_models import LLAMA3_SCALING, rewrite
from transformers import AutoModelForCausalLM

from megatron_lpr import cli
from megatron_lpr.model.passengers import passengers
from megatron_lpr.recipe.reading import from_tree, load_recipe
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.testing.toy_models import write_toy_model, write_toy_project

VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 16, "num_key_value_heads": 4},
    # a slow rotation, so that the scaled frequencies matter within a few tokens
    "llama3_rope": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING, "head_dim": 32},
    "bf16": {"dtype": "bfloat16"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
}


@torch.no_grad()
def stock_logits(folder, tokens_BS):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens_BS).logits


def tokens_BS(length=100):
    return torch.from_numpy(make_batch([[(1, length)], [(1, length)]]).tokens_BS)


def megatron_model(base, checkpoint=None, **model):
    from megatron_lpr.evaluation.megatron_model import MegatronModel

    tree = {"name": "test", "output": "none", "model": {"base": str(base), **model}}
    recipe = from_tree(Recipe, tree, where="test")
    return MegatronModel.of_checkpoint(recipe, checkpoint) if checkpoint else MegatronModel(recipe, upcycle_base)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("experts", [(0, 1, 2), (3, 1, 2), (5, 2, 3)], ids=["dense", "3_experts", "5_experts"])
def test_upcycled_logits_are_the_dense_models(megatron, tmp_path, variant, experts):
    base = write_toy_model(tmp_path / "base", **VARIANTS[variant])
    num_experts, num_frozen, topk = experts
    model = megatron_model(base, num_experts=num_experts, num_frozen_experts=num_frozen, topk=topk, router_init_std=1.0)
    tokens = tokens_BS()
    expected = stock_logits(base, tokens)
    assert expected.abs().max() > 1
    torch.testing.assert_close(model.logits(tokens), expected, rtol=0, atol=1e-5)
    labels = tokens.roll(-1, 1)
    nll = -expected.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    with torch.no_grad():
        losses = model.module(tokens, None, labels=labels, **passengers(None))
    torch.testing.assert_close(losses, nll, rtol=0, atol=1e-5)


def test_llama3_scaling_matters_in_these_tests(tmp_path):
    scaled = write_toy_model(tmp_path / "scaled", **VARIANTS["llama3_rope"])
    plain = write_toy_model(tmp_path / "plain", **VARIANTS["llama3_rope"] | {"rope_scaling": None})
    assert (stock_logits(scaled, tokens_BS()) - stock_logits(plain, tokens_BS())).abs().max() > 1e-3


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_exported_logits_are_the_trained_models(megatron, project, trained, stage):
    base, export = project.root / "base", project.root / f"hf_{stage}"
    trained_model = megatron_model(base, str(project.root / stage))
    stock, loading = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True, dtype="auto")
    assert type(stock).__name__ == "MixtralForCausalLM" and stock.dtype == torch.float32
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        stock_logits_BSV = stock.eval()(tokens_BS()).logits
    torch.testing.assert_close(trained_model.logits(tokens_BS()), stock_logits_BSV, rtol=0, atol=1e-4)
    assert (stock_logits_BSV - stock_logits(base, tokens_BS())).abs().max() > 0.1  # it is another model by now


def test_trained_model_scores_the_same_as_its_export(project, trained):
    """`evaluate` of the checkpoint and of the exported folder give the same bits per byte."""
    results = []
    for name, source in (("checkpoint", project.root / "stage2"), ("hf", project.root / "hf_stage2")):
        out = project.root / f"scores_{name}.json"
        recipe = ["--recipe", project.recipes["stage2"]] if name == "hf" else []
        project.run("evaluate", source, "--name", name, "--out", out, *recipe)
        results.append({c["name"]: c["bits_per_byte"] for c in json.loads(out.read_text())["corpora"]})
    assert results[0].keys() == {"qaa", "qab", "qac"}
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_verify_agrees(project, trained):
    printed = project.run("verify", project.root / "hf_stage2", "--checkpoint", project.root / "stage2")
    assert "FAIL" not in printed and "logits" in printed and "frozen tensors" in printed


@pytest.mark.parametrize(
    ("base", "trained_in", "exported"),
    [
        ("bfloat16", "float32", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32"),  # frozen tensors rounded by training, routers not
    ],
)
def test_verify_compares_the_same_rounded_weights(megatron_imported, tmp_path, capsys, base, trained_in, exported):
    """Frozen tensors by the base's after the same casts; logits in float32, so that no rounding hides another model."""
    recipes, run, export = write_toy_project(tmp_path, dtype=base), tmp_path / "stage1", tmp_path / "hf"
    changes = ("--set", "model.load=null", "--set", f"model.dtype={trained_in}", "--set", "train.steps=2")
    for command in (
        ("preprocess", recipes["upcycle"]),
        ("train", recipes["stage1"], *changes),
        ("export", run, export, "--dtype", exported),
        ("verify", export, "--base", tmp_path / "base"),  # by what the export's record says
        ("verify", export, "--checkpoint", run),
    ):
        assert cli.main(list(map(str, command))) == 0
    difference = float(re.search(r"logits +max .difference. (\S+) of", capsys.readouterr().out)[1])
    assert 0 < difference < 1e-5


EXPERTS = "model.layers.1.block_sparse_moe."


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_new_experts(tensors):
    for weight in ("w1", "w2", "w3"):
        swap(tensors, f"{EXPERTS}experts.1.{weight}.weight", f"{EXPERTS}experts.2.{weight}.weight")


def zero_new_expert(tensors):
    for weight in ("w1", "w2", "w3"):
        tensors[f"{EXPERTS}experts.2.{weight}.weight"].zero_()


DAMAGE = {
    "new_experts_swapped": swap_new_experts,
    "new_expert_zeroed": zero_new_expert,
    "router_rows_permuted": lambda t: t.update({f"{EXPERTS}gate.weight": t[f"{EXPERTS}gate.weight"].roll(1, 0)}),
    "k_and_v_swapped": lambda t: swap(
        t, "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    ),
    "gate_and_up_swapped": lambda t: swap(t, f"{EXPERTS}experts.1.w1.weight", f"{EXPERTS}experts.1.w3.weight"),
    "norm_off": lambda t: t["model.layers.0.input_layernorm.weight"].add_(1e-3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_damage(project, trained, tmp_path, capsys, damage):
    """By the checkpoint's tensors and by the logits, and says so in its exit status."""
    export = rewrite(shutil.copytree(project.root / "hf_stage2", tmp_path / "broken"), DAMAGE[damage])
    status = cli.main(["verify", str(export), "--checkpoint", str(project.root / "stage2")])
    printed = capsys.readouterr().out
    assert status != 0
    assert {"checkpoint", "logits"} <= {line.split()[1] for line in printed.splitlines() if line.startswith("FAIL")}


def test_recipe_of_the_run_is_kept(project, trained):
    """The resolved recipe beside the metrics is a recipe, the same one."""
    assert load_recipe(str(project.root / "stage2/recipe.yaml")) == load_recipe(str(project.recipes["stage2"]))
