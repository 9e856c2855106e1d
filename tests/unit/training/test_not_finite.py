"""A number that is not finite never reaches a weight; its message says the cause, the checkpoint and the way out."""

import dataclasses
import functools

import pytest
import torch
from harness import make_plan, make_recipe, mixed_batch, unwrapped

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.errors import UserError


@pytest.fixture
def make_trainer(megatron, toy_base, tmp_path):
    def make(resume=None, **sections):
        from megatron.core import parallel_state

        from megatron_lpr.training.train import Trainer

        parallel_state.destroy_model_parallel()
        recipe = make_recipe(toy_base, mixed_batch(), tmp_path / "run", {"train": {"trainable": "routers"}} | sections)
        plan = make_plan(recipe, mixed_batch())
        if resume:
            plan = dataclasses.replace(plan, resume=resume, state=read_run_state(resume))
        trainer = Trainer(plan)
        for chunk in trainer.chunks:
            chunk.train()
        return trainer

    return make


def spoil(trainer, name):
    with torch.no_grad():
        dict(unwrapped(trainer).named_parameters())[name].view(-1)[3] = torch.nan


ROUTER, NORM = "decoder.layers.1.mlp.router.weight", "decoder.layers.0.pre_mlp_layernorm.weight"


def test_names_the_learning_rate_where_the_weights_are_sound(make_trainer, monkeypatch):
    trainer = make_trainer(optimizer={"lr": 0.25, "schedule": "constant"})
    monkeypatch.setattr(trainer.optimizer.chained_optimizers[0], "get_grad_norm", lambda: float("inf"))
    before = {name: p.detach().clone() for name, p in unwrapped(trainer).named_parameters()}
    with pytest.raises(UserError) as stopped:
        trainer.finite_step()
    sentence = str(stopped.value)
    assert sentence.startswith("step 1: the gradient norm is inf: lower optimizer.lr (it was 0.25)")
    assert "inspect-data RECIPE --step 1" in sentence and "there is no checkpoint yet" in sentence
    for name, parameter in unwrapped(trainer).named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert trainer.step == 0


def test_names_a_frozen_weight(make_trainer):
    trainer = make_trainer()
    spoil(trainer, NORM)
    with pytest.raises(UserError, match=f"the gradient norm is nan: the frozen weight {NORM} is not finite: look at"):
        trainer.finite_step()


def test_names_a_trained_weight_and_the_checkpoint_to_go_on_from(make_trainer):
    trainer = make_trainer()
    trainer.train_step()
    trainer.save()
    spoil(trainer, ROUTER)
    with pytest.raises(UserError) as stopped:
        trainer.finite_step()
    assert f"step 2: the gradient norm is nan: the trained weight {ROUTER} is not finite any more" in str(stopped.value)
    assert str(stopped.value).endswith("started again, the run goes on from its checkpoint of step 1")
    resumed = make_trainer(resume=trainer.plan.recipe_path().parent / "checkpoints/step_00000001")
    assert resumed.saved_step == 1


def test_loss_that_is_not_finite(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer), "train_step", lambda self: {"ntp_loss": float("nan")})
    with pytest.raises(UserError, match="step 1: the loss is nan: lower optimizer.lr"):
        trainer.finite_step()


@pytest.mark.parametrize("name, kind", [(NORM, "frozen"), (ROUTER, "trained")])
def test_weights_are_looked_at_before_the_first_step(make_trainer, tmp_path, name, kind):
    from megatron_lpr.training.hooks.frozen_weights import FrozenWeights

    trainer = make_trainer()
    trainer.train_step()
    spoil(trainer, name)
    trainer.hooks = [hook for hook in trainer.hooks if not isinstance(hook, FrozenWeights)]
    trainer.save()
    folder = tmp_path / "run/checkpoints/step_00000001"
    with pytest.raises(UserError, match=f"weights from {folder}: the {kind} weight {name} is not finite; convert or"):
        make_trainer(resume=folder)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("trainable", ["routers", "all"])  # one optimizer, or one more for the experts
def test_changed_optimizer_settings_take_effect(make_trainer, tmp_path, sharded, trainable):
    """Megatron takes them from the checkpoint, the learning rate too, whatever the recipe says."""
    make_trainer = functools.partial(
        make_trainer, parallel={"distributed_optimizer": sharded}, train={"trainable": trainable}
    )
    trainer = make_trainer(optimizer={"lr": 0.1, "schedule": "constant"})
    trainer.train_step()
    trainer.save()
    folder = tmp_path / "run/checkpoints/step_00000001"
    settings = {"lr": 0.5, "min_lr": 0.2, "beta1": 0.5, "beta2": 0.6, "eps": 1e-3, "weight_decay": 0.3}
    resumed = make_trainer(resume=folder, optimizer=settings | {"schedule": "constant"})
    for group in resumed.optimizer.param_groups:
        assert (group["lr"], group["min_lr"], tuple(group["betas"]), group["eps"]) == (0.5, 0.2, (0.5, 0.6), 1e-3)
        assert group["weight_decay"] == 0.3 * group["wd_mult"]
