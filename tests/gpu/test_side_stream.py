"""On a GPU: the frozen experts on a side stream give the same numbers, to the bit, as in turn."""

import pytest
import torch
from gpu_marks import NEEDS_TE, ON_GPU
from harness import gradients
from layouts import trainer_of

pytestmark = ON_GPU
SPECS = ["local", pytest.param("te", marks=NEEDS_TE)]


def run(base, stage, output, source, *, spec, recompute, overlap):
    from megatron_lpr.platform import leave_layout

    changes = {
        "model": {"spec": spec, "dtype": "bfloat16"},
        "train": {"recompute": recompute},
        "parallel": {"overlap_frozen": overlap, "frozen": "replicated"},
    }
    torch.use_deterministic_algorithms(True, warn_only=True)  # index_add adds in no order otherwise
    try:
        trainer = trainer_of(base, stage, output, changes, source=source)
        losses = [trainer.train_step() for _ in range(3)]
        grads = {name: gradient.clone() for name, gradient in gradients(trainer).items()}
        del trainer
    finally:
        torch.use_deterministic_algorithms(False)
        leave_layout()
    return [{name: step[name] for name in ("ntp_loss", "grad_norm")} for step in losses], grads


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("stage, recompute", [("stage1", "none"), ("stage1", "full"), ("stage2", "selective")])
def test_same_to_the_bit(source, toy_base, tmp_path, stage, recompute, spec):
    runs = [
        run(toy_base, stage, tmp_path / name, source, spec=spec, recompute=recompute, overlap=overlap)
        for name, overlap in (("in turn", "off"), ("again", "off"), ("beside", "on"))
    ]
    in_turn, again, beside = runs
    assert in_turn[0] == again[0], "not the same twice, and so this shows nothing"
    assert in_turn[0] == beside[0]
    for name in in_turn[1]:
        assert torch.equal(in_turn[1][name], beside[1][name]), name


def test_large_enough_to_run_at_once(megatron):
    """Layers of a size that keeps both streams busy, many times: a race would show."""
    from megatron_lpr.platform.side_stream import Beside, InTurn

    x, a, b = (torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) / 45 for _ in range(3))
    x.requires_grad_()

    def layer(schedule, x):
        work = schedule(x, x[:, :1])
        main = x @ a
        work.start(lambda x, weight: (x @ b) * weight)
        main = main @ a
        return x + main + work.output()

    found = []
    for schedule in (InTurn, Beside, Beside, Beside):
        y = x
        for _ in range(24):
            y = layer(schedule, y)
            y = y / y.detach().abs().max()
        found.append((y.detach(), *torch.autograd.grad(y.float().square().mean(), [x])))
    in_turn, *beside = found
    assert torch.equal(in_turn[0], beside[0][0])
    # a gradient of several parts is summed in the order of their making, which is another: bfloat16 rounds otherwise
    assert (in_turn[1] - beside[0][1]).norm() < 0.03 * in_turn[1].norm()
    for again in beside[1:]:
        for first, second in zip(beside[0], again, strict=True):
            assert torch.equal(first, second)
