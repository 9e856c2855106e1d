"""When a checkpoint is written."""

from pathlib import Path

import torch.distributed as dist

from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer


class Checkpoints(Hook):
    """A checkpoint every `checkpoint.every` steps, and after the last."""

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        every = trainer.recipe.checkpoint.every
        if trainer.finished:
            trainer.save(with_optimizer=trainer.recipe.checkpoint.final_optimizer)
        elif every and trainer.step % every == 0:
            trainer.save()

    def after_save(self, trainer: RunningTrainer, folder: Path) -> None:
        if dist.get_rank() == 0:
            print(f"saved {folder}", flush=True)
