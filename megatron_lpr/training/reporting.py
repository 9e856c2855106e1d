"""What a run shows while it trains and when it ends; rank 0 reports, the other ranks are silent."""

from pathlib import Path

import torch.distributed as dist

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.reporting.metrics_log import MetricsLog, StepMetrics, each_record
from megatron_lpr.reporting.progress import Progress
from megatron_lpr.training.starts import record_start


class Reporter:
    """A line of starts.jsonl; a progress line, metrics.jsonl and TensorBoard for every step; plots at the end."""

    def __init__(self, recipe: Recipe, resumed_step: int) -> None:
        self.recipe = recipe
        record_start(recipe.output, step=resumed_step)
        self._log = MetricsLog(recipe.output, resumed_step=resumed_step) if dist.get_rank() == 0 else None
        self._progress = Progress()
        if self._log and self._log.moved:
            print(self._log.moved, flush=True)

    def step(self, metrics: StepMetrics) -> None:
        """Report one step."""
        if self._log:
            self._progress.report(metrics)
            self._log.write(metrics)

    def finish(self) -> None:
        """Plot the whole run, earlier parts of a resumed one included; the model is saved, whatever becomes of it."""
        if not self._log:
            return
        self._log.close()
        try:
            folder = plot_run(self.recipe)
        except (UserError, OSError) as error:
            print(f"warning: no plots: {error}", flush=True)
        else:
            print(f"plots in {folder}", flush=True)


def plot_run(recipe: Recipe) -> Path:
    """Draw losses and routing of the run in its output folder, reading metrics.jsonl line by line; returns the folder.

    Raises:
        UserError: metrics.jsonl cannot be read.
    """
    from megatron_lpr.reporting.plots import LOSSES, first_and_last, plot_frozen_share, plot_losses

    metrics, folder = Path(recipe.output) / "metrics.jsonl", Path(recipe.output) / "plots"
    losses = [{key: record.get(key) for key in ("step", *LOSSES)} for record in each_record(metrics)]
    plot_losses({recipe.name: losses}, folder / "losses.png")
    if shares := first_and_last(each_record(metrics)):
        model = recipe.model
        largest = min(model.num_frozen_experts, model.topk) / model.topk
        plot_frozen_share(shares, folder / "frozen_share.png", max_share=largest)
    return folder
