"""How much of what its devices could compute a step has computed."""

import re
from typing import TypedDict

import torch

from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.model.router_stats import SLOTS, TOKENS
from megatron_lpr.platform import device
from megatron_lpr.training.cost import logits_in_chunks, step_flops
from megatron_lpr.training.plan import Plan

# Dense bf16 TFLOP/s of the tensor cores, from NVIDIA's data sheets (which print twice as much, "with sparsity"):
# H100 (2023: SXM 1,979, PCIe 1,513, NVL 1,671), H200 (2024: SXM 1,979, NVL 1,671), A100 (2021: 624).
_PEAKS = (
    (r"\bH200 NVL", 835.5),
    (r"\bH200\b", 989.5),
    (r"\bH100 NVL", 835.5),
    (r"\bH100 PCIe", 756.5),
    (r"\bH100\b", 989.5),
    (r"\bA100\b", 312.0),
)


class Throughput(TypedDict, total=False):
    """Of one device in the mean."""

    tflops_per_device: float
    mfu: float


def throughput(plan: Plan, sums_NLC: torch.Tensor, seconds: float) -> Throughput:
    """Operations of the step by its duration, and as a share of the peak where that is known.

    Those of weights' matrix products alone (cost.py). What is computed twice (train.recompute) counts as executed, but
    not in the share: MFU is of what the model needs.

    Args:
        sums_NLC: the routers' statistics of the step; no layers where it has none.
    """
    model, arch, train = plan.recipe.model, plan.arch, plan.train
    positions = train.global_batch_size * plan.data.seq_length
    frozen_slots = [0] * arch.num_layers
    for layer, sums_LC in zip(arch.moe_layers(), sums_NLC, strict=False):
        # padding is routed too, without being counted: as the tokens are, in the mean
        frozen = float(sums_LC[:, SLOTS : SLOTS + model.num_frozen_experts].sum())
        frozen_slots[layer] = round(frozen * positions / max(float(sums_LC[:, TOKENS].sum()), 1.0))
    vocab_size = padded_vocab_size(arch.vocab_size, plan.recipe.parallel.tensor)
    flops = step_flops(
        arch,
        model,
        train.trainable,
        tokens=positions,
        frozen_slots=frozen_slots,
        vocab_size=vocab_size,
        recompute=train.recompute,
        logits_in_chunks=logits_in_chunks(plan.recipe, arch),
    )
    device_seconds = seconds * plan.world_size
    found = Throughput(tflops_per_device=flops.executed / device_seconds / 1e12)
    peak = peak_tflops(torch.cuda.get_device_name() if device().type == "cuda" else "", model.dtype)
    if peak:
        found["mfu"] = flops.total / device_seconds / 1e12 / peak
    return found


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """What a device can do at most in this dtype; None where that is not known."""
    if dtype != "bfloat16" or "MIG" in device_name:
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_name)), None)
