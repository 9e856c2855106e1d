"""What a stage may change and what it may not: exported tensors against the base model's bytes."""

import hashlib
import re

import pytest
import torch
from safetensors.torch import load_file

from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.reporting.metrics_log import read_metrics

ROUTER, EXPERT = re.compile(r"\.gate\.weight$"), re.compile(r"experts\.(\d+)\.(w[123])\.weight$")
DENSE_FFN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def tensors(folder):
    return load_file(folder / "model.safetensors")


def base_name(name):
    """The base model's tensor that a tensor of the export was copied from; None for a router."""
    if ROUTER.search(name):
        return None
    expert = EXPERT.search(name)
    if expert is None:
        return name
    return re.sub(r"block_sparse_moe\.experts.*", f"mlp.{DENSE_FFN[expert[2]]}.weight", name)


def is_new_expert(name):
    expert = EXPERT.search(name)
    return expert is not None and int(expert[1]) > 0


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_frozen_tensors_are_the_bytes_of_the_base_model(project, trained, stage):
    base, export = tensors(project.root / "base"), tensors(project.root / f"hf_{stage}")
    frozen = [name for name in export if not ROUTER.search(name) and not is_new_expert(name)]
    assert {base_name(name) for name in frozen} == set(base)
    for name in frozen:
        assert base[base_name(name)].dtype == torch.bfloat16 and export[name].dtype == torch.float32
        assert sha256(export[name]) == sha256(base[base_name(name)].float()), name


def test_stage_1_changes_every_new_expert_and_router(project, trained):
    base, stage1 = tensors(project.root / "base"), tensors(project.root / "hf_stage1")
    for name in filter(is_new_expert, stage1):
        assert not torch.equal(stage1[name], base[base_name(name)].float()), name
    experts = [torch.cat([t.flatten() for n, t in stage1.items() if f"experts.{e}." in n]) for e in (0, 1, 2)]
    assert not torch.equal(experts[1], experts[2])


def test_stage_2_changes_routers_only(project, trained):
    stage1, stage2 = tensors(project.root / "hf_stage1"), tensors(project.root / "hf_stage2")
    assert stage1.keys() == stage2.keys()
    changed = {name for name in stage1 if sha256(stage1[name]) != sha256(stage2[name])}
    assert changed == {name for name in stage1 if ROUTER.search(name)}


def test_printed_parameters_are_what_the_optimizer_holds(project, trained):
    layers, hidden, ffn, experts, new = 2, 32, 48, 3, 2
    expected = {"stage1": layers * (experts * hidden + new * 3 * hidden * ffn), "stage2": layers * experts * hidden}
    for stage, count in expected.items():
        printed = re.search(r"trainable ([\d,]+), in its optimizer ([\d,]+)", trained[stage])
        assert [int(number.replace(",", "")) for number in printed.groups()] == [count, count]


def test_losses_of_the_stages_fall_and_every_step_is_logged(project, trained):
    for stage, loss in (("stage1", "ntp_loss"), ("stage2", "lpr_loss")):
        metrics = read_metrics(project.root / stage / "metrics.jsonl")
        assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5, 6]
        assert metrics[-1][loss] < metrics[0][loss] - 0.05
        assert (metrics[0]["balance_loss"] is None) == (stage == "stage2")


def test_logged_tokens_are_those_of_the_mixture(project, trained):
    # no window of these six steps is a corpus' short last one: 24 samples of 32 tokens
    assert Manifest.load(str(project.root / "data/manifest.yaml")).languages == ("qaa", "qab")
    for stage, tokens in (("stage1", {"qaa": 768, "qab": 0}), ("stage2", {"qaa": 384, "qab": 384})):
        last = read_metrics(project.root / stage / "metrics.jsonl")[-1]
        assert last["tokens_per_language"] == tokens
        assert set(last["router"]) == {"qaa", "qab"} if stage == "stage2" else {"qaa"}
        for router in last["router"].values():
            for layer in range(2):
                assert sum(router["load"][layer]) == pytest.approx(1)
                assert router["load"][layer][0] == pytest.approx(router["frozen_share"][layer])


@pytest.mark.parametrize("baseline", ["dense", "moe_full", "review_without_lpr"])
def test_baselines_train_and_export(project, trained, baseline):
    printed = project.run("train", baseline)
    counts = re.search(r"parameters on rank 0: ([\d,]+), trainable ([\d,]+), in its optimizer ([\d,]+)", printed)
    total, trainable, held = counts.groups()
    assert trainable == held
    assert (trainable == total) == (baseline != "review_without_lpr")
    out = project.root / f"hf_{baseline}"
    project.run("export", project.root / baseline, out)
    changed = sum(
        base_name(n) is None or not torch.equal(t, tensors(project.root / "base")[base_name(n)].float())
        for n, t in tensors(out).items()
    )
    assert changed == {"dense": 21, "moe_full": 35, "review_without_lpr": 14}[baseline]
