"""Faults of released Megatron-Core versions that every run would meet, put right after import."""

import torch


def install(on_cpu: bool) -> None:
    """Patch the imported Megatron-Core; `on_cpu` adds what only a machine without CUDA needs."""
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16.1 without Transformer Engine: NameError in every router forward (fixed in 0.19.2)
        moe_utils.te_general_gemm = None
    _keep_step_of_torch_adam()
    _load_objects_without_running_them()
    if on_cpu:
        # bound at import from torch.cuda, which has no generator here
        mcore_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
        mcore_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)


def _keep_step_of_torch_adam() -> None:
    """Without Transformer Engine and Apex no distributed optimizer could be loaded from a checkpoint.

    torch's AdamW keeps `step` in the state of each parameter. Megatron (0.16.1) loads it from the parameter groups,
    into one tensor that all parameters share and each would increment, and then asks for it among a parameter's own
    tensors: KeyError.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_but_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        return set_states(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_step


def _load_objects_without_running_them() -> None:
    """torch's planner (2.13) unpickles the objects of a checkpoint with weights_only=False: they may run code.

    Each is first loaded with weights_only=True, which knows tensors, plain types and what Megatron-Core has registered.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    load_bytes = DefaultLoadPlanner.load_bytes
    if getattr(load_bytes, "checks_first", False):
        return  # installed already

    def load_checked_bytes(self, read_item, value):
        torch.load(value, map_location="cpu", weights_only=True)
        value.seek(0)
        return load_bytes(self, read_item, value)

    load_checked_bytes.checks_first = True
    DefaultLoadPlanner.load_bytes = load_checked_bytes
