"""Operations by duration: the closed form of the step's own routing, and the peaks of devices by their names."""

import pytest
from harness import EXPANDED, ORIGINAL, PADDING, make_batch, make_plan, make_recipe

from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.training import throughput as module
from megatron_lpr.training.cost import step_flops
from megatron_lpr.training.throughput import peak_tflops, throughput


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("num_experts", [4, 0])
def test_a_step_of_two_seconds_on_two_devices(megatron, toy_base, tmp_path, monkeypatch, num_experts, recompute):
    from megatron.core import parallel_state

    from megatron_lpr.training.step_metrics import step_metrics
    from megatron_lpr.training.train import Trainer

    sums = []
    monkeypatch.setattr(
        step_metrics.__module__ + ".throughput", lambda plan, sums_NLC, seconds: sums.append(sums_NLC) or {}
    )
    batch = make_batch([[(EXPANDED, 16)], [(ORIGINAL, 8), (PADDING, 8)]])
    train = {"trainable": "all", "recompute": recompute}
    recipe = make_recipe(toy_base, batch, tmp_path, {"train": train, "model": {"num_experts": num_experts}})
    plan = make_plan(recipe, batch, world_size=2)
    try:
        metrics = Trainer(plan).train_step()
    finally:
        parallel_state.destroy_model_parallel()
    shares = metrics.get("router", {})
    slots = [0, 0]
    for layer in range(2 if num_experts else 0):
        counted = 16 * 2 * shares["qaa"]["frozen_share"][layer] + 8 * 2 * shares["qab"]["frozen_share"][layer]
        slots[layer] = round(counted * 32 / 24)  # padding is routed like the rest, as far as is known
    vocab_size = padded_vocab_size(257, 1)
    flops = step_flops(
        plan.arch, recipe.model, "all", tokens=32, frozen_slots=slots, vocab_size=vocab_size, recompute=recompute
    )
    assert (flops.executed > flops.total) == (recompute == "full")
    assert throughput(plan, sums[0], 2.0) == {"tflops_per_device": pytest.approx(flops.executed / 4 / 1e12)}
    monkeypatch.setattr(module, "peak_tflops", lambda name, dtype: 1e-3)
    assert throughput(plan, sums[0], 2.0)["mfu"] == pytest.approx(flops.total / 4 / 1e9)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a part of it
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40S", None),
        ("", None),
    ],
)
def test_peaks(name, peak):
    assert peak_tflops(name, "bfloat16") == peak and peak_tflops(name, "float32") is None
