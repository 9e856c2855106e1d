"""Faults of released Megatron-Core versions that every run would meet, put right after import."""

import torch


def install(on_cpu: bool) -> None:
    """Patch the imported Megatron-Core; `on_cpu` adds what only a machine without CUDA needs."""
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16.1 without Transformer Engine: NameError in every router forward (fixed in 0.19.2)
        moe_utils.te_general_gemm = None
    if on_cpu:
        # bound at import from torch.cuda, which has no generator here
        mcore_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
        mcore_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
