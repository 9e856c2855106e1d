"""Python's garbage, collected by all ranks at once."""

import gc

from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.training.hooks.hook import EndsAlike, RunningTrainer


class Garbage(EndsAlike):
    """Every `train.collect_garbage_every` steps, and not in between.

    Python collects by itself when a process has made so many objects, which each rank has at another time: then all
    others wait for it, and of many ranks there is always one. What has no cycles is freed at once as ever.
    """

    def start(self, trainer: RunningTrainer) -> None:
        gc.collect()
        gc.disable()

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if trainer.step % trainer.plan.train.collect_garbage_every == 0:
            gc.collect()

    def end(self, trainer: RunningTrainer) -> None:
        gc.enable()
