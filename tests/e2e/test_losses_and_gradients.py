"""Losses and gradients of the Megatron model against the plain PyTorch reference's autograd."""

import pytest
import torch
from harness import (
    EXPANDED,
    ORIGINAL,
    PADDING,
    as_tensors,
    gradients,
    make_batch,
    make_plan,
    make_recipe,
    mixed_batch,
    reference_sizes,
    scramble,
    unwrapped,
)
from reference import from_megatron, losses

STAGE1 = {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.5}}
STAGE2 = {"train": {"trainable": "routers"}, "lpr": {"coeff": 0.5}}
EVERYTHING = {"train": {"trainable": "all"}, "balance": {"coeff": 0.3}, "lpr": {"coeff": 0.5}}


def check(base, batch, tmp_path, sections):
    """One step of a Trainer against the reference; returns the step's metrics."""
    from megatron_lpr.training.train import Trainer

    recipe = make_recipe(base, batch, tmp_path, sections)
    trainer = Trainer(make_plan(recipe, batch))
    sizes = reference_sizes(trainer.plan.arch, recipe)
    scramble(unwrapped(trainer))
    weights = from_megatron(dict(unwrapped(trainer).named_parameters()), sizes)
    if not recipe.model.num_experts:
        weights |= {f"{layer}.router": torch.zeros(1, 32, dtype=torch.double) for layer in range(sizes.num_layers)}
    for weight in weights.values():
        weight.requires_grad_()
    for chunk in trainer.chunks:
        chunk.train()

    metrics = trainer.train_step()
    expected = losses(
        weights,
        sizes,
        **as_tensors(batch),
        alpha=recipe.balance.coeff,
        gamma=recipe.lpr.coeff,
        double_softmax=recipe.lpr.loss == "double_softmax",
    )
    expected.total.backward()

    assert metrics["ntp_loss"] == pytest.approx(expected.ntp.item(), rel=1e-6)
    per_language = {trainer.plan.manifest.languages[abs(tag) - 1]: ntp for tag, ntp in expected.ntp_of_tag.items()}
    assert metrics["ntp_loss_per_language"] == pytest.approx({k: v.item() for k, v in per_language.items()}, rel=1e-6)
    weighted = sum(loss * metrics["tokens_per_language"][k] for k, loss in metrics["ntp_loss_per_language"].items())
    assert weighted / metrics["tokens"] == pytest.approx(metrics["ntp_loss"], rel=1e-6)
    if recipe.balance.coeff:
        assert metrics["balance_loss"] == pytest.approx(expected.balance.item(), rel=1e-6)
    if (batch.tags_BS > 0).any() and recipe.model.num_experts:
        assert metrics["lpr_loss"] == pytest.approx(expected.lpr.item(), rel=1e-6)
    else:
        assert metrics["lpr_loss"] is None
    got = from_megatron(gradients(trainer), sizes)
    if recipe.model.num_experts:
        assert_trainable(set(got), set(weights), recipe)
    for name, gradient in got.items():
        size = weights[name].grad.abs().max()
        assert size > 0, name
        torch.testing.assert_close(gradient, weights[name].grad, rtol=0, atol=1e-5 * size.item(), msg=name)
    norm = torch.stack([weights[name].grad.norm() for name in got]).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    return metrics


def assert_trainable(got, every, recipe):
    """`got` names exactly the weights that the policy trains."""
    frozen = {str(e) for e in range(recipe.model.num_frozen_experts)}
    routers = {name for name in every if name.endswith(".router")}
    experts = {name for name in every if name.count(".") == 2 and name.split(".")[1] not in frozen}
    assert (
        got == {"routers": routers, "new_experts_and_routers": routers | experts, "all": every}[recipe.train.trainable]
    )


def both(one, other):
    return {name: one.get(name, {}) | other.get(name, {}) for name in one.keys() | other.keys()}


@pytest.mark.parametrize("stage", [STAGE1, STAGE2], ids=["stage1", "stage2"])
@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_means_are_over_the_global_batch(megatron, toy_base, tmp_path, stage, micro_batch_size):
    check(toy_base, mixed_batch(), tmp_path, both(stage, {"train": {"micro_batch_size": micro_batch_size}}))


@pytest.mark.parametrize("stage", [STAGE1, STAGE2], ids=["stage1", "stage2"])
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("num_frozen", [1, 2])
def test_frozen_experts_and_topk(megatron, toy_base, tmp_path, stage, num_frozen, topk):
    check(toy_base, mixed_batch(), tmp_path, both(stage, {"model": {"num_frozen_experts": num_frozen, "topk": topk}}))


@pytest.mark.parametrize("stage", [STAGE1, STAGE2], ids=["stage1", "stage2"])
def test_batch_without_original_tokens(megatron, toy_base, tmp_path, stage):
    batch = make_batch([[(EXPANDED, 16)], [(EXPANDED, 7), (PADDING, 9)]])
    assert check(toy_base, batch, tmp_path, stage)["lpr_loss"] is None


def test_micro_batch_without_original_tokens(megatron, toy_base, tmp_path):
    batch = make_batch([[(EXPANDED, 16)], [(ORIGINAL, 1), (PADDING, 15)]])
    check(toy_base, batch, tmp_path, both(STAGE2, {"train": {"micro_batch_size": 1}}))


@pytest.mark.parametrize("num_frozen", [1, 2])
def test_double_softmax(megatron, toy_base, tmp_path, num_frozen):
    sections = both(STAGE2, {"lpr": {"loss": "double_softmax"}, "model": {"num_frozen_experts": num_frozen}})
    check(toy_base, mixed_batch(), tmp_path, sections)


@pytest.mark.parametrize("base", ["toy_base", "toy_tied"])
def test_everything_trained(megatron, request, base, tmp_path):
    check(request.getfixturevalue(base), mixed_batch(), tmp_path, EVERYTHING)


def test_dense_model_is_one_expert(megatron, toy_base, tmp_path):
    check(toy_base, mixed_batch(), tmp_path, {"model": {"num_experts": 0}})


@pytest.mark.parametrize("stage", [STAGE1, STAGE2, EVERYTHING], ids=["stage1", "stage2", "all"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(megatron, toy_base, tmp_path, stage, recompute):
    sections = both(stage, {"train": {"recompute": recompute, "micro_batch_size": 2}})
    check(toy_base, mixed_batch(), tmp_path, sections)
