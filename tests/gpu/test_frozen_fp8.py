"""On a GPU: frozen weights that are held in FP8 compute the same, in less memory."""

import pytest
import torch
from gpu_marks import ON_GPU
from layouts import trainer_of

from megatron_lpr.platform.fp8 import lacking_for_fp8
from megatron_lpr.testing.toy_models import write_toy_model

pytestmark = ON_GPU


@pytest.mark.parametrize("numbers", ["tensorwise", "blockwise"])
def test_same_numbers_in_less_memory(megatron, tmp_path, numbers):
    from megatron_lpr.platform import leave_layout

    if lacking := lacking_for_fp8(numbers):
        pytest.skip(lacking)
    base = write_toy_model(tmp_path / "base", hidden_size=512, intermediate_size=1024)
    steps, held = {}, {}
    for frozen_weights in ("bf16", "fp8"):
        changes = {
            "model": {"spec": "te", "dtype": "bfloat16"},
            "fp8": {"recipe": numbers, "frozen_weights": frozen_weights},
        }
        before = torch.cuda.memory_allocated()
        trainer = trainer_of(base, "stage1", tmp_path / frozen_weights, changes)
        metrics = [trainer.train_step() for _ in range(3)]
        steps[frozen_weights] = [[step[name] for name in ("ntp_loss", "balance_loss", "grad_norm")] for step in metrics]
        held[frozen_weights] = torch.cuda.memory_allocated() - before
        del trainer
        leave_layout()
    for in_fp8, in_bf16 in zip(steps["fp8"], steps["bf16"], strict=True):
        assert in_fp8 == pytest.approx(in_bf16, rel=1e-5)
    of_layer = 3 * 512 * 1024 + 2 * 512 * 512  # the frozen expert, and of attention queries and output at least
    assert held["bf16"] - held["fp8"] > 2 * 2 * of_layer * 0.9
