"""A number that is not finite never reaches a weight; its message says the cause, the checkpoint and the way out."""

import copy
import dataclasses
import functools
import math
import socket

import pytest
import torch
from harness import make_plan, make_recipe, mixed_batch, unwrapped

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import complete_lines, from_json


@pytest.fixture
def make_trainer(megatron, toy_base, tmp_path):
    def make(resume=None, **sections):
        from megatron.core import parallel_state

        from megatron_lpr.training.train import Trainer

        parallel_state.destroy_model_parallel()
        train = {"trainable": "routers"} | sections.pop("train", {})
        recipe = make_recipe(toy_base, mixed_batch(), tmp_path / "run", {"train": train, **sections})
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


@pytest.fixture
def poison(monkeypatch):
    """poison(trainer, step, value): the loss of that step is `value`, however often it is computed."""
    from megatron_lpr.training import step as module

    real, bad = module.next_token_loss, {}

    def loss(*arguments):
        is_bad = bad and bad["trainer"].step + 1 == bad["step"]
        return real(*arguments) * (bad["value"] if is_bad else 1.0)

    def set_bad(trainer, step, value=float("nan")):
        bad.update(trainer=trainer, step=step, value=value)

    monkeypatch.setattr(module, "next_token_loss", loss)
    return set_bad


PLACE = {"sample": 1, "corpus": "qab", "document": 7, "first_token": 32, "tokens": 3}


@pytest.fixture
def documents(monkeypatch):
    """What the samples hold, in place of a corpus; collects the samples that were asked for."""
    asked = []

    def documents_of(manifest, data, seed, samples):
        asked.append(list(samples))
        return [PLACE | {"document": 7 + i} for i in range(5)]

    monkeypatch.setattr("megatron_lpr.training.fault.documents_of", documents_of)
    return asked


def state_of(trainer):
    """Everything that learns: weights, moments, schedule."""
    weights = {name: p.detach().clone() for name, p in unwrapped(trainer).named_parameters()}
    return copy.deepcopy([weights, trainer.optimizer.state_dict(), trainer.scheduler.state_dict()])


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_stops_and_names_rank_documents_and_ways_out(make_trainer, poison, documents):
    trainer = make_trainer(optimizer={"lr": 0.25, "schedule": "constant"}, train={"micro_batch_size": 2})
    poison(trainer, 1, float("inf"))
    before = {name: p.detach().clone() for name, p in unwrapped(trainer).named_parameters()}
    with pytest.raises(UserError) as stopped:
        trainer.finite_step()
    sentence, host = str(stopped.value), socket.gethostname()
    assert sentence.startswith(
        f"step 1: the loss of rank 0 ({host}) is inf; it read qab document 7 (tokens 32 to 34), "
    )
    assert ", 2 more: lower optimizer.lr (it was 0.25) or optimizer.clip_grad, set train.on_not_finite" in sentence
    assert "inspect-data RECIPE --step 1" in sentence and "there is no checkpoint yet" in sentence
    assert documents == [[0, 1, 2, 3]]
    assert_same(dict(unwrapped(trainer).named_parameters()), before)
    assert trainer.step == 0


@pytest.mark.parametrize("policy", ["skip", "skip_and_mark"])
def test_a_step_is_skipped_and_leaves_what_learns_untouched(make_trainer, poison, documents, tmp_path, capsys, policy):
    train = {"on_not_finite": policy, "max_skipped_steps": 1, "trainable": "all"}
    trainer = make_trainer(train=train, balance={"coeff": 0.1})
    assert trainer.finite_step()["balance_loss"]
    before, consumed = state_of(trainer), trainer.consumed_samples
    poison(trainer, 2)
    metrics = trainer.finite_step()
    assert_same(state_of(trainer), before)
    assert metrics["skipped"] == f"the loss of rank 0 ({socket.gethostname()}) is nan"
    assert metrics["balance_loss"] is metrics["lpr_loss"] is None
    assert (metrics["step"], metrics["skipped_steps"]) == (2, 1) and trainer.consumed_samples == 2 * consumed
    assert (
        f"step 2 is skipped (1 of at most 1): {metrics['skipped']}; it read qab document 7" in capsys.readouterr().err
    )
    marked = tmp_path / "run/marked.jsonl"
    assert marked.exists() == (policy == "skip_and_mark")
    if marked.exists():
        assert [from_json(line) for line in complete_lines(marked)][0] == {"step": 2, **PLACE}
    after = trainer.finite_step()
    assert after["skipped_steps"] == 1 and "skipped" not in after and math.isfinite(after["grad_norm"])
    assert read_run_state(trainer.save()).skipped_steps == 1


def test_a_loss_that_is_not_finite_though_its_gradient_is(make_trainer, documents, monkeypatch):
    from megatron_lpr.training import step as module

    real = module.next_token_loss
    monkeypatch.setattr(module, "next_token_loss", lambda *arguments: real(*arguments) + math.inf)
    trainer = make_trainer(train={"on_not_finite": "skip"})
    before = {name: p.detach().clone() for name, p in unwrapped(trainer).named_parameters()}
    assert trainer.finite_step()["skipped"].endswith("is inf")
    assert_same(dict(unwrapped(trainer).named_parameters()), before)


def test_so_many_steps_may_be_skipped_and_a_resumed_run_counts_on(make_trainer, poison, documents):
    train = {"on_not_finite": "skip", "max_skipped_steps": 1}
    trainer = make_trainer(train=train)
    poison(trainer, 1)
    trainer.finite_step()
    resumed = make_trainer(resume=trainer.save(), train=train)
    poison(resumed, 2)
    with pytest.raises(
        UserError, match="train.max_skipped_steps: 1 of 1 steps have been skipped, and at step 2 the loss"
    ):
        resumed.finite_step()


def test_names_the_gradient_that_the_backward_pass_met_first(make_trainer, documents):
    trainer = make_trainer(train={"trainable": "routers", "on_not_finite": "skip"})
    weights = dict(unwrapped(trainer).named_parameters())
    for layer in (0, 1):
        weights[f"decoder.layers.{layer}.mlp.router.weight"].register_hook(lambda g: g * torch.nan)
    metrics = trainer.finite_step()
    assert metrics["skipped"].startswith("the gradient of decoder.layers.1.mlp.router.weight on rank 0 (")
    assert math.isfinite(metrics["ntp_loss"]) and "router" not in metrics


def test_a_norm_that_is_too_large_for_its_type(make_trainer, documents):
    trainer = make_trainer(train={"trainable": "routers", "on_not_finite": "skip"})
    weights = dict(unwrapped(trainer).named_parameters())
    weights["decoder.layers.1.mlp.router.weight"].register_hook(lambda g: g.fill_(1e30))
    assert "is 1e+30, too large for a norm in float32 (inf)" in trainer.finite_step()["skipped"]


def test_what_is_finite_when_it_is_computed_again_is_the_machines_fault(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.optimizer.chained_optimizers[0], "get_grad_norm", lambda: float("inf"))
    with pytest.raises(
        UserError, match="norm is inf, but computed again it is finite on every rank: look at the memory"
    ):
        trainer.finite_step()


def test_a_loss_without_its_corpora_is_told_all_the_same(make_trainer, poison):
    trainer = make_trainer()  # the manifest of these tests has no corpora on the disk
    poison(trainer, 1)
    with pytest.raises(UserError, match=r"step 1: the loss of rank 0 \(.*\) is nan: lower optimizer.lr"):
        trainer.finite_step()


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

    trainer = make_trainer(checkpoint={"whole": True})  # a frozen weight would come from the base, which is sound
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
