"""Documents that do not see each other: Transformer Engine's attention gives the numbers of torch's."""

import dataclasses

import numpy as np
import pytest
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.platform import leave_layout, megatron
from megatron_lpr.recipe.settings import CheckpointConfig
from megatron_lpr.testing.run_distributed import run_distributed

LOSSES = ("ntp_loss", "lpr_loss", "grad_norm")


def one_step(base, output, spec: str, *, apart: bool = True, recompute: str = "none", context: int = 1):
    from megatron_lpr.training.train import Trainer

    batch = mixed_batch()
    begins = np.zeros(batch.tokens_BS.shape, bool)
    begins[:, 5] = begins[0, 6] = begins[1, 12] = True
    batch = dataclasses.replace(batch, documents_BS=np.cumsum(begins, axis=1).astype(np.int32) if apart else None)
    sections = {
        "model": {"spec": spec},
        "train": {"trainable": "all", "micro_batch_size": 2, "recompute": recompute},
        "lpr": {"coeff": 0.5},
        "data": {"reset_attention": apart},
        "parallel": {"context": context},
    }
    recipe = make_recipe(base, batch, output, sections)
    recipe = dataclasses.replace(recipe, checkpoint=CheckpointConfig(final_optimizer=False))
    trainer = Trainer(make_plan(recipe, batch, world_size=context))
    metrics = trainer.train_step()
    leave_layout()
    return {name: metrics[name] for name in LOSSES}


def over_context(base, output):
    with megatron():
        return one_step(base, output, "te", context=2)


@pytest.fixture(scope="module")
def expected(toy_base, tmp_path_factory):
    with megatron():
        output = tmp_path_factory.mktemp("run")
        local, seen_through = one_step(toy_base, output, "local"), one_step(toy_base, output, "local", apart=False)
    assert abs(seen_through["grad_norm"] - local["grad_norm"]) > 1e-3
    return local


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_process(expected, toy_base, tmp_path, recompute):
    with megatron():
        got = one_step(toy_base, tmp_path, "te", recompute=recompute)
    assert got == pytest.approx(expected, rel=1e-5)


def test_over_context_parallel_ranks(expected, toy_base, tmp_path):
    for got in run_distributed(over_context, 2, toy_base, tmp_path):
        assert got == pytest.approx(expected, rel=1e-5)
