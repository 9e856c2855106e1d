"""What a run shows while it trains and when it ends; rank 0 reports, the other ranks are silent."""

from pathlib import Path

import torch.distributed as dist

from megatron_lpr.config import Recipe
from megatron_lpr.training.metrics_log import MetricsLog, StepMetrics, read_metrics
from megatron_lpr.training.progress import Progress


class Reporter:
    """A progress line, metrics.jsonl and TensorBoard for every step; plots at the end of the run."""

    def __init__(self, recipe: Recipe, resumed_step: int) -> None:
        self.recipe = recipe
        self._log = MetricsLog(recipe.output, resumed_step=resumed_step) if dist.get_rank() == 0 else None
        self._progress = Progress()

    def step(self, metrics: StepMetrics) -> None:
        """Report one step."""
        if self._log:
            self._progress.report(metrics)
            self._log.write(metrics)

    def finish(self) -> None:
        """Plot the whole run, earlier parts of a resumed one included."""
        if not self._log:
            return
        self._log.close()
        from megatron_lpr.evaluation.routing_plots import first_and_last, plot_frozen_share, plot_losses

        folder = Path(self.recipe.output)
        records = read_metrics(folder / "metrics.jsonl")
        plot_losses({self.recipe.name: records}, folder / "plots/losses.png")
        shares, model = first_and_last(records), self.recipe.model
        if shares:
            largest = min(model.num_frozen_experts, model.topk) / model.topk
            plot_frozen_share(shares, folder / "plots/frozen_share.png", max_share=largest)
        print(f"plots in {folder / 'plots'}", flush=True)
