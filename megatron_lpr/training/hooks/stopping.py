"""A run that is asked to stop, by a signal or because its time is over."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_lpr.errors import warn
from megatron_lpr.platform.time_limit import job_end
from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.signals import listener
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer, is_validated

_NAMED_RANKS = 8
MARK = "stopped"  # in the output folder, while the newest start has stopped so and not ended otherwise


class Stopping(Hook):
    """Asks for the stop, in time for a whole step and the save; says in the end what asked, and where the run is.

    The last of the hooks that every run has: before it a signal ends the start-up, as there is nothing to save yet.
    """

    def __init__(self) -> None:
        self._limits: dict[str, float] = {}  # on rank 0: what is over when, by time.monotonic
        self._over: str | None = None
        self._slowest = self._slowest_validation = 0.0

    def start(self, trainer: RunningTrainer) -> None:
        self._signals = listener()
        if dist.get_rank() == 0:
            self._mark(trainer).unlink(missing_ok=True)
            self._limits = _limits(trainer, self._signals.since)
        self._signals.stop_at_a_step(lambda: trainer.votes.say("stop"))

    def before_step(self, trainer: RunningTrainer) -> None:
        seconds = self._slowest
        if is_validated(trainer, trainer.step + 1):
            seconds += self._slowest_validation
        for what, end in self._limits.items():
            if time.monotonic() + seconds > end:
                self._over = what
                trainer.votes.say("stop")

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        self._slowest = max(self._slowest, metrics["seconds"])
        self._slowest_validation = max(self._slowest_validation, metrics.get("validation_seconds", 0.0))

    def stop(self, trainer: RunningTrainer) -> None:
        of_ranks = [""] * dist.get_world_size()
        dist.all_gather_object(of_ranks, self._signals.what_asked())
        if dist.get_rank() == 0:
            asked = told(of_ranks) or self._over or "a hook"
            sentence = (
                f"stopped by {asked} after step {trainer.step:,} of {trainer.plan.train.steps:,}, which is saved; the "
                "same command goes on from there"
            )
            self._mark(trainer).write_text(f"{sentence}\n", encoding="utf-8")
            print(sentence, flush=True)
        self._signals.has_stopped()

    @staticmethod
    def _mark(trainer: RunningTrainer) -> Path:
        return Path(trainer.recipe.output) / MARK


def told(asked: Sequence[str]) -> str:
    """Which signal on which ranks, of what each of them says; nothing where there was none."""
    ranks: dict[str, list[int]] = {}
    for rank, what in enumerate(asked):
        if what:
            ranks.setdefault(what, []).append(rank)
    return " and ".join(f"{what}{_named(those, len(asked))}" for what, those in ranks.items())


def _named(ranks: Sequence[int], world_size: int) -> str:
    if world_size == 1:
        return ""
    if len(ranks) == world_size:
        return " on all ranks"
    first = ", ".join(map(str, ranks[:_NAMED_RANKS]))
    more = f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else ""
    return f" on rank{'s' if len(ranks) > 1 else ''} {first}{more}"


def _limits(trainer: RunningTrainer, since: float) -> dict[str, float]:
    """What ends this start of the run, and when; `since` it began."""
    limits, now = {}, time.monotonic()
    if minutes := trainer.plan.train.max_minutes:
        limits[f"train.max_minutes ({minutes:g})"] = since + 60 * minutes
    end = job_end()
    if end is not None:
        left, margin = end - time.time(), 60 * trainer.recipe.cluster.margin_minutes
        if left < 0:
            warn(
                f"by this host's clock the time of Slurm job {os.environ['SLURM_JOB_ID']} was over {-left / 60:,.0f} "
                "minutes ago: the run makes one step; where this shell has outlived its job, unset SLURM_JOB_ID"
            )
        elif left < margin:
            warn(
                f"the Slurm job ends in {left / 60:.1f} minutes, and the run stops {margin / 60:g} minutes before "
                "(cluster.margin_minutes): it makes one step"
            )
        limits["the time limit of the Slurm job"] = now + left - margin
    return limits
