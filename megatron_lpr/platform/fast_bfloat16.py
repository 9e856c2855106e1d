"""Whether this machine multiplies bfloat16 faster than float32, or only emulates it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_lpr.platform.device import device

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
_FIRST_CAPABILITY = 8  # A100


def fast_in_bfloat16() -> tuple[bool, str]:
    """Of this rank's GPU, or of the processor where there is none; and why, as `the processor has amx_bf16`."""
    if device().type == "cuda":
        major, minor = torch.cuda.get_device_capability(device())
        return major >= _FIRST_CAPABILITY, f"the GPU has compute capability {major}.{minor}"
    has = _capabilities()
    for name in _INSTRUCTIONS:
        if has.get(name):
            return True, f"the processor has {name}"
    return False, f"the processor has neither {' nor '.join(_INSTRUCTIONS)}"


def _capabilities() -> Mapping[str, object]:
    """As torch tells them, or where it is too old for that, Linux; none where neither is there to ask."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return ask()
    try:
        return dict.fromkeys(Path("/proc/cpuinfo").read_text().split(), True)
    except OSError:
        return {}
