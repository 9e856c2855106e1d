"""The numbers of every step, for people and for files."""

import torch.distributed as dist

from megatron_lpr.reporting.metrics_log import MetricsLog, StepMetrics
from megatron_lpr.reporting.progress import Progress
from megatron_lpr.training.hooks.hook import EndsAlike, RunningTrainer


class Metrics(EndsAlike):
    """A progress line for every step, metrics.jsonl and TensorBoard."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._log: MetricsLog | None = None  # of rank 0

    def start(self, trainer: RunningTrainer) -> None:
        if dist.get_rank() != 0:
            return
        self._log = MetricsLog(trainer.recipe.output, resumed_step=trainer.step)
        if self._log.moved:
            print(self._log.moved, flush=True)

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._log:
            self._progress.report(metrics)
            self._log.write(metrics)

    def end(self, trainer: RunningTrainer) -> None:
        if self._log:
            self._log.close()
