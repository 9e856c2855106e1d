"""What the watchdog is told of a run: how long a step, a save and what comes between may take."""

import statistics
from collections import deque
from pathlib import Path

import torch.distributed as dist

from megatron_lpr.data.sampler.inspect_data import step_documents
from megatron_lpr.platform.watchdog import watchdog
from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.training.hooks.hook import EndsAlike, RunningTrainer

_MEASURED, _AT_LEAST = 50, 3  # steps whose median counts; before there are so many, the limit of the start-up holds


class Watching(EndsAlike):
    """Steps are measured against the median of the last ones; whatever is no step has the time of the start-up."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_MEASURED)

    def start(self, trainer: RunningTrainer) -> None:
        if (dog := watchdog()) and dist.get_rank() == 0:
            dog.describe = lambda folder: _write_batch(trainer, folder)

    def before_step(self, trainer: RunningTrainer) -> None:
        _expect(f"step {trainer.step + 1:,}", self._limit(trainer), trainer.step + 1)

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        self._seconds.append(metrics["seconds"])
        expect_no_step(trainer, f"what follows step {trainer.step:,}")

    def before_save(self, trainer: RunningTrainer) -> None:
        expect_no_step(trainer, f"the save after step {trainer.step:,}")

    def after_save(self, trainer: RunningTrainer, folder: Path) -> None:
        expect_no_step(trainer, f"what follows the save of {folder.name}")

    def end(self, trainer: RunningTrainer) -> None:
        expect_no_step(trainer, "the end of the run")

    def _limit(self, trainer: RunningTrainer) -> float:
        settings = trainer.recipe.cluster
        if not settings.watchdog:
            return 0.0
        if len(self._seconds) < _AT_LEAST:
            return 60 * settings.startup_minutes
        return max(settings.watchdog * statistics.median(self._seconds), settings.watchdog_floor_seconds)


def expect_no_step(trainer: RunningTrainer, what: str) -> None:
    """From now on `what` is going on, which has the time of the start-up."""
    _expect(what, 60 * trainer.recipe.cluster.startup_minutes, trainer.step)


def _expect(what: str, seconds: float, step: int) -> None:
    if dog := watchdog():
        dog.expect(what, seconds, f"step_{step:08d}")


def _write_batch(trainer: RunningTrainer, folder: Path) -> None:
    """What the step reads that is going on, or would come next."""
    folder.mkdir(parents=True, exist_ok=True)
    step = min(trainer.step + 1, trainer.plan.train.steps)
    (folder / "batch.txt").write_text(f"{step_documents(trainer.recipe, step)}\n", encoding="utf-8")
