"""Which rank the others wait for, and which has least memory left.

All ranks end a step together, for they wait for each other in the sum of the gradients: its duration says nothing. So
each measures how long it takes from the beginning of a step until its own gradients are there and that sum is all it
needs; on the device's clock, and without waiting for the device. Ranks that exchange something before that (tensor,
context, expert, pipeline parallelism) are late together: then it is known which group is slow, and its machine.
Pipeline stages do not end at the same time anyhow, so that a rank is compared with those of its own stage.
"""

import functools
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from megatron_lpr.platform import device
from megatron_lpr.reporting.metrics_log import RanksRecord, StepMetrics
from megatron_lpr.reporting.progress import stamped
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer

_SLOW = 1.1  # times the median: worth a line


@dataclass(frozen=True, kw_only=True)
class RankPlaceOfWork:
    """Where a rank runs, and which part of the model it has."""

    host: str
    stage: int


class Stragglers(Hook):
    """Every `logging.stragglers_every` steps the metrics have the slowest rank and the one that takes most memory."""

    def start(self, trainer: RunningTrainer) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        self._clock = ComputeClock()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        own = RankPlaceOfWork(host=socket.gethostname(), stage=stage)
        self._places = [own] * dist.get_world_size()
        dist.all_gather_object(self._places, own)
        config = get_model_config(trainer.chunks[0])
        config.finalize_model_grads_func = self._clock.before(config.finalize_model_grads_func)

    def before_step(self, trainer: RunningTrainer) -> None:
        self._clock.begin()

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        self._clock.end()
        if trainer.step % trainer.recipe.logging.stragglers_every:
            return
        seconds, steps = self._clock.take()
        own = torch.tensor([seconds, memory_bytes()], dtype=torch.float64, device=device())
        of_ranks = [torch.empty_like(own) for _ in self._places]
        dist.all_gather(of_ranks, own)
        metrics["ranks"] = ranks_record(torch.stack(of_ranks).tolist(), self._places)
        if dist.get_rank() == 0 and (sentence := slow_rank(metrics["ranks"], trainer.step, steps)):
            print(stamped(sentence), flush=True)


class ComputeClock:
    """Seconds from `begin` to where the wrapped function is called, summed until they are taken.

    Megatron calls what sums up the gradients once a step, with all chunks, at the end of the backward pass.
    """

    def __init__(self) -> None:
        self._began: Moment | None = None
        self._reached: Moment | None = None
        self._seconds: list[float] = []

    def begin(self) -> None:
        self._began, self._reached = Moment(), None

    def before(self, function):
        """`function`, with the clock stopped before it."""

        @functools.wraps(function)
        def stopped(*arguments, **options):
            self._reached = Moment()
            return function(*arguments, **options)

        return stopped

    def end(self) -> None:
        """After the step, when the device has done all of it."""
        if self._began and self._reached:
            self._seconds.append(self._reached.since(self._began))

    def take(self) -> tuple[float, int]:
        """The mean since the last call, and of how many steps."""
        seconds, self._seconds = self._seconds, []
        return (statistics.fmean(seconds) if seconds else 0.0), len(seconds)


class Moment:
    """Now, on the device's clock where it has one; asks nothing of the device until `since`."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device().type == "cuda" else None
        if self._event:
            self._event.record()
        self._time = time.perf_counter()

    def since(self, earlier: "Moment") -> float:
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time


def memory_bytes() -> int:
    """The most that torch has had at once of the GPU's memory; on a CPU what the process has now."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def ranks_record(numbers: Sequence[Sequence[float]], places: Sequence[RankPlaceOfWork]) -> RanksRecord:
    """The extremes of (seconds, bytes) of each rank."""
    of_stage: dict[int, list[float]] = {}
    for (seconds, _), place in zip(numbers, places, strict=True):
        of_stage.setdefault(place.stage, []).append(seconds)
    medians = [statistics.median_low(of_stage[place.stage]) for place in places]
    slowest = max(range(len(places)), key=lambda rank: numbers[rank][0] / max(medians[rank], 1e-9))
    largest = max(range(len(places)), key=lambda rank: numbers[rank][1])
    return {
        "compute_seconds": {
            "median": medians[slowest],
            "max": numbers[slowest][0],
            "rank": slowest,
            "host": places[slowest].host,
        },
        "memory_gb": {"max": numbers[largest][1] / 1e9, "rank": largest, "host": places[largest].host},
    }


def slow_rank(record: RanksRecord, step: int, steps: int) -> str | None:
    """A line about the slowest rank where it is worth one."""
    slowest = record["compute_seconds"]
    if slowest["max"] <= _SLOW * slowest["median"]:
        return None
    return (
        f"the slowest rank is {slowest['rank']} ({slowest['host']}): {slowest['max']:.3g} s to compute a step, the "
        f"median {slowest['median']:.3g} s ({steps} steps up to {step})"
    )
