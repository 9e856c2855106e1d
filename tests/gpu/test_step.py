"""On a GPU: nothing of ours waits for the device in a step, and grouped products compute what the loop does."""

import warnings

import pytest
import torch
from gpu_marks import NEEDS_TE, ON_GPU
from layouts import trainer_of

pytestmark = ON_GPU
LOCAL = {"model": {"spec": "local", "dtype": "bfloat16", "num_experts": 5}}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_no_wait_of_ours(megatron, toy_base, tmp_path, stage):
    trainer = trainer_of(toy_base, stage, tmp_path, LOCAL)
    trainer.train_step()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not [f"{wait.filename}:{wait.lineno}" for wait in waits if "/megatron_lpr/" in wait.filename]


@pytest.mark.parametrize("spec", ["local", pytest.param("te", marks=NEEDS_TE)])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_grouped_products_are_those_of_each_expert(source, toy_base, tmp_path, monkeypatch, stage, spec):
    from megatron_lpr.model import grouped_experts
    from megatron_lpr.platform import leave_layout

    changes = {"model": LOCAL["model"] | {"spec": spec}}
    found = []
    for largest in (grouped_experts.LARGEST, -1):
        monkeypatch.setattr(grouped_experts, "LARGEST", largest)
        trainer = trainer_of(toy_base, stage, tmp_path / str(largest), changes, source=source)
        modules = [module for chunk in trainer.chunks for module in chunk.modules()]
        experts = [module for module in modules if isinstance(module, grouped_experts.GroupedExperts)]
        assert bool(experts) == (largest > 0 or spec == "local")
        assert all(module.is_grouped == (largest > 0) for module in experts)
        found.append([trainer.train_step() for _ in range(2)])
        del trainer, modules, experts
        leave_layout()
    for at_once, one_by_one in zip(*found, strict=True):
        for name in ("ntp_loss", "balance_loss", "grad_norm"):
            assert at_once[name] == pytest.approx(one_by_one[name], rel=2e-2), name


@pytest.mark.parametrize("spec", ["local", "auto"])
def test_scored_without_training(megatron, source, toy_base, tmp_path, spec):
    """Megatron-Core leaves router weights on the host until a router's first product with gradients."""
    from layouts import recipe_of

    from megatron_lpr.evaluation.megatron_model import MegatronModel

    recipe = recipe_of(toy_base, "stage2", tmp_path, {"model": {"spec": spec, "dtype": "bfloat16"}})
    model = MegatronModel.of_checkpoint(recipe, str(source))
    tokens_BS = torch.arange(32).view(2, 16)
    assert model.logits(tokens_BS).isfinite().all()
