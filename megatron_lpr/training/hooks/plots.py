"""Pictures of a run that has ended."""

from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import Recipe
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
    """Draw losses and routing of the run in its output folder; returns the folder for pictures.

    Raises:
        UserError: metrics.jsonl cannot be read.
    """
    from megatron_lpr.reporting.pictures import largest_share
    from megatron_lpr.reporting.plots import plot_frozen_share, plot_losses
    from megatron_lpr.reporting.run_log import read_log

    log, folder = read_log(Path(recipe.output) / "metrics.jsonl"), Path(recipe.output) / "plots"
    plot_losses({recipe.name: log}, folder / "losses.png")
    if shares := log.frozen_shares():
        plot_frozen_share(shares, folder / "frozen_share.png", max_share=largest_share(vars(recipe.model)))
    return folder
