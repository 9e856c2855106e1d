"""The router inside a model: its statistics, its precision, and the counts it divides by."""

import pytest
import torch
from harness import as_tensors, make_trainer, mixed_batch, scramble, unwrapped, upcycle_base

from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_token_is_counted_once(megatron, toy_base, tmp_path, recompute, monkeypatch):
    from megatron_lpr.training.step_metrics import StatsOfStep

    seen, read = [], StatsOfStep.read
    monkeypatch.setattr(StatsOfStep, "read", lambda stats: seen.append(read(stats)) or seen[-1])
    train = {"trainable": "new_experts_and_routers", "recompute": recompute, "micro_batch_size": 2}
    trainer = make_trainer(toy_base, tmp_path, train=train, balance={"coeff": 0.1})
    for _ in range(2):
        trainer.train_step()
        sums_NLC = seen.pop().sums_NLC
        assert sums_NLC[:, :, 0].tolist() == [[21, 7, 16]] * 2  # tokens of each language, in both layers
        assert sums_NLC[:, :, 3:].sum(-1).tolist() == [[42, 14, 32]] * 2  # two slots each


def test_evaluation_collects_without_gradients_and_adds_no_loss(megatron, toy_base, tmp_path):
    from megatron_lpr.model.passengers import passengers

    trainer = make_trainer(toy_base, tmp_path, lpr={"coeff": 0.1}, balance={"coeff": 0.1})
    trainer.chunks[0].eval()
    batch = as_tensors(mixed_batch())
    with torch.no_grad():
        trainer.chunks[0](batch["tokens_BS"], None, labels=batch["labels_BS"], **passengers(batch["tags_BS"]))
    for router in trainer.routers:
        sums, balance, _ = router.stats.take()
        assert sums[:, 0].tolist() == [21, 7, 16] and balance.item() == 0


def test_routing_is_fp32_in_a_bf16_model(megatron, toy_base, tmp_path):
    trainer = make_trainer(toy_base, tmp_path, model={"dtype": "bfloat16"})
    scramble(unwrapped(trainer))
    router = trainer.routers[0]
    assert router.weight.dtype == torch.float32 and not torch.equal(router.weight, router.weight.bfloat16().float())
    hidden = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for needs_grad in (False, True):
        logits = router.gating(hidden.clone().requires_grad_(needs_grad))
        assert logits.dtype == torch.float32
        exact = hidden.double() @ router.weight.double().T
        torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=1e-6)
        probs, chosen = router(hidden.clone().requires_grad_(needs_grad))
        assert probs.dtype == torch.float32 and chosen.dtype == torch.bool
        torch.testing.assert_close(probs.sum(-1), torch.ones(12))
        assert (chosen.sum(-1) == 2).all() and torch.equal(probs > 0, chosen)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_step_below_the_precision_of_bf16_changes_a_router(megatron, toy_base, tmp_path, distributed):
    trainer = make_trainer(
        toy_base,
        tmp_path,
        model={"dtype": "bfloat16"},
        train={"trainable": "routers"},
        optimizer={"lr": 1e-6, "weight_decay": 0.0},
        parallel={"distributed_optimizer": distributed},
    )
    scramble(unwrapped(trainer))
    trainer.optimizer.reload_model_params()
    weight = trainer.routers[0].weight
    before = weight.detach().clone()
    trainer.train_step()
    assert torch.equal(before.bfloat16(), weight.bfloat16()) and 0 < (weight - before).abs().max() <= 1.1e-6


def test_a_route_and_a_gradient_below_the_precision_of_bf16(megatron, toy_base):
    from megatron_lpr.evaluation.megatron_model import MegatronModel
    from megatron_lpr.model.builder import routers

    model = {"base": str(toy_base), "num_experts": 3, "topk": 1, "dtype": "bfloat16"}
    recipe = from_tree(Recipe, {"name": "x", "output": "none", "model": model}, where="test")
    router = routers(*MegatronModel(recipe, upcycle_base).chunks)[0]
    with torch.no_grad():
        router.weight[:] = torch.tensor([1.0, 1.001, 1.002])[:, None]  # 1.0 and 1.0078 are next to each other in bf16
        _, chosen = router(torch.ones(4, 1, 32, dtype=torch.bfloat16))
    assert chosen.nonzero()[:, 1].tolist() == [2] * 4

    router.weight.requires_grad_()
    logits_SBE = router.gating(torch.ones(4, 1, 32, dtype=torch.bfloat16))
    logits_SBE.backward(torch.full_like(logits_SBE, 1 + 2**-12))  # in bf16 that is 1
    assert router.weight.grad.unique().tolist() == [4 * (1 + 2**-12)]


def test_all_routers_share_the_trainers_counts(megatron, toy_base, tmp_path):
    trainer = make_trainer(toy_base, tmp_path)
    assert len(trainer.routers) == 2
    assert all(router.counts is trainer.counts for router in trainer.routers)
    assert [router.layer_number for router in trainer.routers] == [1, 2]


@pytest.mark.parametrize("group, expected", [("sequence", 4), ("micro_batch", 2)])
def test_counts_of_a_step(megatron, toy_base, tmp_path, group, expected):
    balance = {"group": group, "coeff": 0.1}
    trainer = make_trainer(toy_base, tmp_path, balance=balance, train={"micro_batch_size": 2})
    with torch.no_grad():
        for router in trainer.routers:
            router.weight.zero_()  # every expert is as likely as any other: the loss of each group is its floor, 1
    metrics = trainer.train_step()
    counts = trainer.counts
    assert (counts.tokens, counts.original_tokens, counts.balance_groups) == (44, 23, expected)
    assert metrics["balance_loss"] == pytest.approx(1, rel=1e-6)
