"""What the code runs on: CUDA with NCCL where there is a GPU, otherwise CPU with gloo."""

from megatron_lpr.platform.device import backend, device, prepare
from megatron_lpr.platform.distributed import (
    Ranks,
    from_first_rank,
    join,
    leave,
    leave_layout,
    megatron,
    on_leave,
    single_process,
)
from megatron_lpr.platform.meeting import collected, meeting, same_on_all_ranks, together

__all__ = [
    "Ranks",
    "backend",
    "collected",
    "device",
    "from_first_rank",
    "join",
    "leave",
    "leave_layout",
    "meeting",
    "megatron",
    "on_leave",
    "prepare",
    "same_on_all_ranks",
    "single_process",
    "together",
]
