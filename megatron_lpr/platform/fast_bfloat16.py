"""Whether this machine multiplies bfloat16 faster than float32."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_lpr.platform.device import device

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
_FIRST_CAPABILITY = 8  # A100
_ROWS, _WIDTH, _ROUNDS = 512, 1024, 6  # a product of a billion operations: longer than it takes to start one


def fast_in_bfloat16() -> tuple[bool, str]:
    """Of this rank's GPU, or of the processor where there is none; and why."""
    if device().type == "cuda":
        major, minor = torch.cuda.get_device_capability(device())
        return major >= _FIRST_CAPABILITY, f"the GPU has compute capability {major}.{minor}"
    has = _capabilities()
    name = next((name for name in _INSTRUCTIONS if has.get(name)), None)
    if name is None:
        return False, f"the processor has neither {' nor '.join(_INSTRUCTIONS)}"
    ratio = _speed_over_float32()
    return ratio > 1, f"the processor has {name}, and multiplies with it {ratio:.1f} times as fast as in float32"


@functools.cache
def _speed_over_float32() -> float:
    """Of a product, measured in some 100 ms, once in a process.

    That an instruction is there does not say what it takes: AMD's avx512_bf16 has twice the operations of float32 in a
    second, that of an Intel Xeon whose AMX the host keeps back has half.
    """
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    # one thread, and its own time: others may use the machine; the first round of each compiles
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in [*seconds] * _ROUNDS:
            rows = torch.ones(_ROWS, _WIDTH, dtype=dtype, device="cpu")
            weight = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device="cpu")
            begin = time.thread_time()
            torch.nn.functional.linear(rows, weight)
            seconds[dtype] = min(seconds[dtype], time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _capabilities() -> Mapping[str, object]:
    """As torch tells them, or where it is too old for that, Linux; none where neither is there to ask."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return ask()
    try:
        return dict.fromkeys(Path("/proc/cpuinfo").read_text().split(), True)
    except OSError:
        return {}
