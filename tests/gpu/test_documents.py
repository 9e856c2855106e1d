"""Documents that do not see each other: Transformer Engine's attention gives the numbers of torch's.

On a GPU, where bfloat16 asks for cuDNN's kernels, and on the emulation (`make test-te`), where none are.
"""

import dataclasses

import numpy as np
import pytest
import torch
from gpu_marks import ON_GPU_OR_EMULATION
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.platform import leave_layout, megatron
from megatron_lpr.recipe.settings import CheckpointConfig
from megatron_lpr.testing.run_distributed import run_distributed

pytestmark = ON_GPU_OR_EMULATION
DTYPES = {"float32": 1e-3 if torch.cuda.is_available() else 1e-5, "bfloat16": 3e-2}  # fp32 products may be TF32
LOSSES = ("ntp_loss", "lpr_loss", "grad_norm")


def one_step(base, output, spec: str, dtype: str, *, apart: bool = True, recompute: str = "none", context: int = 1):
    from megatron_lpr.training.train import Trainer

    batch = mixed_batch()
    begins = np.zeros(batch.tokens_BS.shape, bool)
    begins[:, 5] = begins[0, 6] = begins[1, 12] = True
    batch = dataclasses.replace(batch, documents_BS=np.cumsum(begins, axis=1).astype(np.int32) if apart else None)
    sections = {
        "model": {"spec": spec, "dtype": dtype},
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
        return one_step(base, output, "te", "float32", context=2)


@pytest.fixture(scope="module")
def expected(toy_base, tmp_path_factory):
    with megatron():
        output = tmp_path_factory.mktemp("run")
        local = {dtype: one_step(toy_base, output, "local", dtype) for dtype in DTYPES}
        seen_through = one_step(toy_base, output, "local", "float32", apart=False)
    assert abs(seen_through["grad_norm"] / local["float32"]["grad_norm"] - 1) > 2e-2
    return local


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_process(expected, toy_base, tmp_path, dtype, recompute):
    with megatron():
        got = one_step(toy_base, tmp_path, "te", dtype, recompute=recompute)
    assert got == pytest.approx(expected[dtype], rel=DTYPES[dtype])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU for each of two ranks")
def test_over_context_parallel_ranks(expected, toy_base, tmp_path):
    for got in run_distributed(over_context, 2, toy_base, tmp_path):
        assert got == pytest.approx(expected["float32"], rel=DTYPES["float32"])
