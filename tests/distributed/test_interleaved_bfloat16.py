"""Weights of two dtypes in a chunk of an interleaved pipeline, gathered after a step of the distributed optimizer."""

import pytest
from harness import make_plan, make_recipe, mixed_batch

OPTIMIZERS = {
    "whole": {"distributed_optimizer": False},
    "distributed": {"distributed_optimizer": True},
    "overlapped": {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
}


def losses(base, folder) -> dict[str, list[float]]:
    """Of the first steps with each optimizer, where routers (fp32) and all else (bfloat16) learn."""
    from megatron_lpr.platform import leave_layout, megatron
    from megatron_lpr.training.train import Trainer

    sections = {"model": {"dtype": "bfloat16"}, "train": {"micro_batch_size": 1}, "optimizer": {"lr": 1e-2}}
    found = {}
    with megatron():
        for name, settings in OPTIMIZERS.items():
            parallel = {"pipeline": 2, "virtual_pipeline": 2} | settings
            recipe = make_recipe(base, mixed_batch(), folder / name, sections | {"parallel": parallel})
            trainer = Trainer(make_plan(recipe, mixed_batch(), world_size=4))
            found[name] = [trainer.train_step()["ntp_loss"] for _ in range(3)]
            del trainer
            leave_layout()
    return found


def test_each_optimizer_makes_the_same_steps(on_ranks, tmp_path):
    from megatron_lpr.testing.toy_models import write_toy_model

    base = write_toy_model(tmp_path / "base", num_hidden_layers=4)
    for found in on_ranks(losses, 4, base, tmp_path):
        assert found["whole"][2] < found["whole"][0] - 0.1
        for name in OPTIMIZERS:
            assert found[name] == pytest.approx(found["whole"], rel=1e-4), name
