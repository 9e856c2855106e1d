"""The update of a step against torch's AdamW, and the learning rates of a run."""

import math

import pytest
import torch
from harness import gradients, make_trainer, scramble, unwrapped
from layouts import trainer_of


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("clip_grad", [0.0, 0.1, 1e9])
def test_two_steps_are_adamws(megatron, toy_tied, tmp_path, distributed, clip_grad):
    optimizer = {"lr": 1e-2, "min_lr": 1e-2, "weight_decay": 0.3, "beta2": 0.9, "clip_grad": clip_grad}
    trainer = make_trainer(
        toy_tied, tmp_path, optimizer=optimizer, parallel={"distributed_optimizer": distributed}, lpr={"coeff": 0.1}
    )
    scramble(unwrapped(trainer))
    copies = {n: torch.nn.Parameter(p.detach().double()) for n, p in unwrapped(trainer).named_parameters()}
    decayed = [p for p in copies.values() if p.ndim > 1]
    plain = [p for p in copies.values() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.9)
    )
    for _ in range(2):
        metrics = trainer.train_step()
        for name, gradient in gradients(trainer).items():
            copies[name].grad = gradient.double()  # clipped already
        norm = torch.stack([p.grad.norm() for p in copies.values()]).norm().item()
        if clip_grad == 0.1:
            assert metrics["grad_norm"] > 1 and norm == pytest.approx(0.1, rel=1e-4)
        else:
            assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        reference.step()
    for name, parameter in unwrapped(trainer).named_parameters():
        if name.endswith("word_embeddings.weight"):
            parameter, copies[name] = parameter[:257], copies[name][:257]
        torch.testing.assert_close(parameter.double(), copies[name].detach(), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "schedule, decay",
    [
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("linear", lambda x: 1 - x),
        ("constant", lambda x: 1),
    ],
)
def test_learning_rates(megatron, toy_base, tmp_path, schedule, decay):
    optimizer = {"lr": 1.0, "min_lr": 0.1, "schedule": schedule, "warmup_steps": 3}
    trainer = make_trainer(toy_base, tmp_path, optimizer=optimizer, train={"steps": 10})
    rates = []
    for _ in range(10):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.scheduler.step(increment=1)
    warmup = [0.25, 0.5, 0.75]
    after = [0.1 + 0.9 * decay(step / 7) for step in range(7)]
    assert rates == pytest.approx(warmup + after)


@pytest.mark.parametrize("stage", ["stage1", "moe_full"])
def test_routers_may_have_a_rate_of_their_own(megatron, toy_base, tmp_path, stage):
    from megatron_lpr.platform import leave_layout

    def moved(name, **optimizer):
        settings = {"lr": 1e-3, "warmup_steps": 3, "weight_decay": 0.0, "clip_grad": 0.0} | optimizer
        trainer = trainer_of(toy_base, stage, tmp_path / name, {"optimizer": settings})
        before = {name: weight.detach().clone() for name, weight in unwrapped(trainer).named_parameters()}
        metrics = trainer.train_step()
        change = {name: weight.detach() - before[name] for name, weight in unwrapped(trainer).named_parameters()}
        trainer.save()
        leave_layout()
        return metrics, change

    plain, without = moved("without")
    own, with_rate = moved("with", router_lr=1e-2)
    assert "router_lr" not in plain
    assert own["lr"] == plain["lr"] == pytest.approx(1e-3 / 4) and own["router_lr"] == pytest.approx(1e-2 / 4)
    for name, step in without.items():
        factor = 10 if ".router." in name else 1
        torch.testing.assert_close(with_rate[name], factor * step, rtol=1e-3, atol=1e-7, msg=name)

    for saved, router_lr in (("with", 5e-4), ("with", None), ("without", 5e-4)):  # a run may go on with other rates
        resume = tmp_path / saved / "checkpoints/step_00000001"
        changes = {"optimizer": {"lr": 1e-4, "router_lr": router_lr}}
        trainer = trainer_of(toy_base, stage, tmp_path / saved, changes, resume=resume)
        rates = {(group["is_decoupled_lr"], group["lr"]) for group in trainer.optimizer.param_groups}
        metrics = trainer.train_step()
        leave_layout()
        assert rates == {(False, metrics["lr"])} | ({(True, metrics["router_lr"])} if router_lr else set())
        assert metrics["lr"] < 1e-4 and metrics.get("router_lr") == (router_lr and pytest.approx(5 * metrics["lr"]))


def test_gradient_that_is_not_finite_is_refused(megatron, toy_base, tmp_path):
    from megatron_lpr.errors import UserError

    trainer = make_trainer(toy_base, tmp_path)
    with torch.no_grad():
        unwrapped(trainer).decoder.final_layernorm.weight[0] = torch.inf
    with pytest.raises(UserError, match="step 1: the gradient norm is"):
        trainer.finite_step()
