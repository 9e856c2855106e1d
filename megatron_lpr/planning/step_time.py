"""A bound for the time of a step: every product at the GPU's peak, every link at its own.

A real step is slower: small products do not reach the peak, experts are not loaded evenly, the optimizer and the norms
take time. Of two layouts the one with the lower bound is the better guess.

    micro-batch   max(compute + what is waited for, gathering of frozen weights)
    step          micro-batches x (1 + bubble) x micro-batch + reduction of gradients, as far as it is not hidden

Waited for is what the next product needs: tensor, context and expert parallelism, pipeline neighbours. Frozen weights
are gathered a layer ahead. Gradients are hidden behind the last micro-batch where `overlap_grad_reduce` says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning.hardware import GPU
from megatron_lpr.planning.links import OnLinks, on_links
from megatron_lpr.planning.moves import Move
from megatron_lpr.planning.operations import Operations
from megatron_lpr.planning.schedule import bubble

_OF_GRADIENTS = ("data", "expert_data")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a rank in one step; `total` is the bound."""

    compute: float
    waiting: float
    gathering: float
    gradients: float
    bubble: float
    total: float


def at_peak(work: Operations, gpu: GPU, dtype: str) -> float:
    """Seconds in which one GPU computes it, each product at the peak of its numbers."""
    seconds = (work.total - work.in_fp8) / gpu.flops[dtype]
    return seconds + work.in_fp8 / gpu.flops["fp8"] if work.in_fp8 else seconds


def step_time(
    place: Place, gpu: GPU, dtype: str, work: Operations, moves: Sequence[Move], micro_batches: int
) -> StepTime:
    """Of a rank of one pipeline stage; the step is as long as that of its slowest."""
    compute = at_peak(work, gpu, dtype) / place.of_stage
    on: dict[str, OnLinks] = {"gathering": OnLinks(), "gradients": OnLinks(), "waiting": OnLinks()}
    for move in moves:
        of_gradients = move.ranks in _OF_GRADIENTS
        kind = "gathering" if move.purpose == "frozen" else "gradients" if of_gradients else "waiting"
        on[kind] += on_links(move, place, gpu)
    waiting, gathering, gradients = (on[kind].seconds(gpu) for kind in ("waiting", "gathering", "gradients"))
    busy = max(compute + waiting, gathering)
    idle = busy * bubble(place, micro_batches)
    hidden = busy / micro_batches if place.sizes.overlap_grad_reduce else 0.0
    return StepTime(
        compute=compute,
        waiting=waiting,
        gathering=gathering,
        gradients=gradients,
        bubble=idle,
        total=busy + idle + max(0.0, gradients - hidden),
    )
