"""What this machine can compute in FP8."""

import importlib
from typing import Any

import torch

from megatron_lpr.platform.device import device
from megatron_lpr.platform.transformer_engine import lacking_for_transformer_engine

_ASKED = {
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


def lacking_for_fp8(recipe: str) -> str | None:
    """Why an FP8 recipe cannot be computed with here, as Transformer Engine says it; None where it can.

    It knows the GPUs and versions of CUDA that each recipe needs, and they differ from version to version.
    """
    if lacking := lacking_for_transformer_engine():
        return f"it {lacking}"
    try:
        can_say = getattr(fp8_state_manager(), _ASKED[recipe], None)
        if can_say is None:
            return f"the installed Transformer Engine has no recipe {recipe}"
        if device().type == "cuda":
            torch.cuda.set_device(device())
        available, reason = can_say()
    except (RuntimeError, AssertionError, ImportError, OSError) as error:  # another GPU, or no core library
        return str(error).strip().splitlines()[0]
    return None if available else reason.rstrip(".")


def fp8_state_manager() -> Any:
    """Transformer Engine's, of all modules of this process."""
    try:
        return importlib.import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager
    except ModuleNotFoundError:  # its name until 2.8
        return importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
