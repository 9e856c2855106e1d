"""On a GPU: fused kernels compute what PyTorch's operations compute."""

import pytest
import torch
from gpu_marks import NEEDS_TE, ON_GPU
from layouts import STAGES, trainer_of

pytestmark = [*ON_GPU, NEEDS_TE]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-3), ("bfloat16", 5e-2)])  # fp32 products may be TF32
def test_same_losses(source, toy_base, tmp_path, stage, dtype, tolerance):
    from megatron_lpr.model.fused_kernels import description
    from megatron_lpr.platform import leave_layout

    metrics = {}
    for setting in ("off", "auto"):
        changes = {"model": {"spec": "te", "dtype": dtype, "fused_kernels": setting}}
        trainer = trainer_of(toy_base, stage, tmp_path / setting, changes, source=source)
        metrics[setting] = [trainer.train_step() for _ in range(3)]
        used = description(trainer.chunks)
        del trainer
        leave_layout()
    # in bfloat16 new experts are torch's grouped products, whose gradients stay its own
    accumulates = stage in ("dense", "moe_full") or (stage == "stage1" and dtype == "float32")
    expected = {"rotary embedding"} | ({"gradient accumulation"} if accumulates else set())
    expected |= set() if stage == "dense" else {"router", "permutation"}
    assert used.startswith(f"fused kernels: {', '.join(sorted(expected))};")
    for step, (off, auto) in enumerate(zip(metrics["off"], metrics["auto"], strict=True)):
        for name in ("ntp_loss", "balance_loss", "lpr_loss", "grad_norm"):
            # an update of a toy in bfloat16 sends a token or two elsewhere, which the next norm shows and no loss does
            near = tolerance * (2 if step and name == "grad_norm" else 1)
            assert auto[name] == (off[name] and pytest.approx(off[name], rel=near)), name


@pytest.mark.parametrize("experts, topk", [(5, 1), (9, 2), (128, 8)])
def test_router(megatron, experts, topk):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    logits = torch.randn(4096, experts, device="cuda", requires_grad=True)
    weight = torch.randn(4096, experts, device="cuda")
    found = []
    for fused in (False, True):
        probs, chosen = topk_routing_with_score_function(logits, topk, fused=fused)
        found.append((probs.detach(), chosen, *torch.autograd.grad((probs * weight).sum(), [logits])))
    (probs, chosen, grad), (fused_probs, fused_chosen, fused_grad) = found
    assert torch.equal(chosen, fused_chosen) and fused_chosen.dtype is torch.bool
    torch.testing.assert_close(fused_probs, probs)
    torch.testing.assert_close(fused_grad, grad)


def test_permutation_of_some_slots(megatron):
    """Slots of frozen experts are none of the dispatcher's: tokens have one or two rows, and some experts none."""
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    chosen = torch.zeros(512, 6, dtype=torch.bool, device="cuda")
    chosen[torch.arange(512), torch.arange(512) % 4] = True
    chosen[::3, 4] = True
    x = torch.randn(512, 64, device="cuda", requires_grad=True)
    probs = torch.rand(512, 6, device="cuda", requires_grad=True)
    found = []
    for fused in (False, True):
        rows, row_probs, mapping = permute(x, chosen, probs=probs, num_out_tokens=chosen.sum().cpu(), fused=fused)
        output = unpermute(rows * row_probs[:, None], mapping, x.shape, routing_map=chosen, fused=fused)
        found.append((output.detach(), *torch.autograd.grad(output.sin().sum(), [x, probs])))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)
