"""When a checkpoint is written, and when one that is being written is whole."""

import time
from pathlib import Path

import torch.distributed as dist

from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.reporting.progress import stamped
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer


class Checkpoints(Hook):
    """A checkpoint every `checkpoint.every` steps, every `every_minutes`, and after the last step.

    What one rank knows alone, rank 0's clock and the end of its own writing, it says with every step (votes.py): no
    collective more, and all ranks do the same at the same step.
    """

    def start(self, trainer: RunningTrainer) -> None:
        self._last = time.monotonic()

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        settings, votes = trainer.recipe.checkpoint, trainer.votes
        if votes.count("failed") or votes.count("written") == dist.get_world_size():
            trainer.finish_save()
        steps = [every for every in (settings.every, settings.keep_every) if every]
        if trainer.finished:
            trainer.save(with_optimizer=settings.final_optimizer)
        elif votes.count("save") or any(trainer.step % every == 0 for every in steps):
            trainer.save(wait=not settings.asynchronous)
            self._last = time.monotonic()
        self._tell(trainer)

    def after_save(self, trainer: RunningTrainer, folder: Path) -> None:
        if dist.get_rank() == 0:
            print(stamped(f"saved {folder}"), flush=True)

    def fail(self, trainer: RunningTrainer, error: BaseException) -> None:
        """Alone, a process still finishes what it has begun to write; with others it cannot: they may be gone."""
        if dist.get_world_size() == 1 and isinstance(error, Exception):
            trainer.finish_save()

    def _tell(self, trainer: RunningTrainer) -> None:
        """With the next step, until it is seen."""
        minutes = trainer.recipe.checkpoint.every_minutes
        if minutes and dist.get_rank() == 0 and time.monotonic() - self._last >= 60 * minutes:
            trainer.votes.say("save")
        if trainer.writer.has_ended:
            trainer.votes.say("failed" if trainer.writer.has_failed else "written")
