"""Pictures of a run that has ended."""

from pathlib import Path
from typing import cast

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.reporting.metrics_log import StepMetrics, each_record
from megatron_lpr.reporting.progress import stamped
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer


class Plots(Hook):
    """Losses and routing of the whole run, earlier starts included; the model is saved, whatever becomes of them."""

    def finish(self, trainer: RunningTrainer) -> None:
        try:
            folder = plot_run(trainer.recipe)
        except (UserError, OSError) as error:
            print(f"warning: no plots: {error}", flush=True)
        else:
            print(stamped(f"plots in {folder}"), flush=True)


def plot_run(recipe: Recipe) -> Path:
    """Draw losses and routing of the run in its output folder, reading metrics.jsonl line by line; returns the folder.

    Raises:
        UserError: metrics.jsonl cannot be read.
    """
    from megatron_lpr.reporting.plots import LOSSES, plot_frozen_share, plot_losses
    from megatron_lpr.reporting.run_log import first_and_last

    metrics, folder = Path(recipe.output) / "metrics.jsonl", Path(recipe.output) / "plots"
    losses = [cast(StepMetrics, {key: record.get(key) for key in ("step", *LOSSES)}) for record in each_record(metrics)]
    plot_losses({recipe.name: losses}, folder / "losses.png")
    if shares := first_and_last(each_record(metrics)):
        model = recipe.model
        largest = min(model.num_frozen_experts, model.topk) / model.topk
        plot_frozen_share(shares, folder / "frozen_share.png", max_share=largest)
    return folder
