"""Products that add a weight's gradient to Megatron's buffer: the same gradients, and none for frozen weights."""

import pytest
import torch
from harness import gradients, unwrapped
from layouts import trainer_of, write_source


@pytest.mark.parametrize("stage", ["stage1", "stage2", "moe_full"])
def test_same_gradients(megatron, toy_base, tmp_path, stage):
    from megatron_lpr.platform import leave_layout

    source = write_source(toy_base, tmp_path / "source")
    leave_layout()
    found = {}
    for setting in ("off", "auto"):
        changes = {"model": {"spec": "te", "fused_kernels": setting}}
        trainer = trainer_of(toy_base, stage, tmp_path / setting, changes, source=source)
        trainer.train_step()
        trainer.train_step()
        found[setting] = {name: gradient.clone() for name, gradient in gradients(trainer).items()}
        modules = [module for module in unwrapped(trainer).modules() if hasattr(module, "fuse_wgrad_accumulation")]
        fused = [module for module in modules if module.fuse_wgrad_accumulation]
        assert bool(fused) == (setting == "auto" and stage != "stage2")
        for name, parameter in unwrapped(trainer).named_parameters():
            assert parameter.requires_grad or not hasattr(parameter, "main_grad"), name
        del trainer, modules, fused
        leave_layout()
    for name, gradient in found["off"].items():
        torch.testing.assert_close(found["auto"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
