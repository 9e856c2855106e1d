"""What Transformer Engine keeps for the whole process does not outlive the layout that it was made for."""

import te_on_cpu
import torch
from layouts import trainer_of


def test_fp8_state_is_reset_when_a_layout_is_left(megatron, toy_base, tmp_path):
    """Delayed scaling reduces the maxima of every module that ever ran, in the groups that they ran in."""
    import transformer_engine.pytorch as te
    from megatron.core import parallel_state
    from transformer_engine.common.recipe import DelayedScaling

    from megatron_lpr.platform import leave_layout

    for layout in ("first", "second"):
        trainer_of(toy_base, "stage1", tmp_path / layout, {"model": {"spec": "te"}})
        linear = te.Linear(32, 32, bias=False, params_dtype=torch.bfloat16, device="cpu")
        groups = parallel_state.get_tensor_model_parallel_group()
        te_on_cpu.reset_calls()
        with te.autocast(enabled=True, recipe=DelayedScaling(), amax_reduction_group=groups):
            linear(torch.ones(16, 32, dtype=torch.bfloat16))
        assert te_on_cpu.called()["fused_amax_and_scale_update_after_reduction"] == 1, layout
        leave_layout()
