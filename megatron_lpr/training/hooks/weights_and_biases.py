"""Weights & Biases, for those who ask for it; whatever becomes of it, the training goes on."""

import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lpr.errors import warn
from megatron_lpr.files import durable
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.reporting.metrics_log import StepMetrics, scalars
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer

_START_SECONDS, _END_SECONDS = 60, 30
_NO_NAME = str.maketrans(dict.fromkeys("/\\#?%:", "-"))  # what W&B refuses in the name of a project


class WeightsAndBiases(Hook):
    """The numbers of TensorBoard, on rank 0, under one W&B run for all starts of the run."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, trainer: RunningTrainer) -> None:
        self._attempt(lambda: self._begin(trainer.recipe))

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._run:
            self._attempt(lambda: self._run.log({"step": metrics["step"], **dict(scalars(metrics))}))

    def finish(self, trainer: RunningTrainer) -> None:
        self._end(0)

    def stop(self, trainer: RunningTrainer) -> None:
        self._end(0)

    def fail(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._end(1)

    def _begin(self, recipe: Recipe) -> None:
        import wandb  # checks.py has seen to it

        is_online = recipe.logging.wandb == "online"
        self._run = wandb.init(
            project=recipe.name.translate(_NO_NAME)[:128],
            name=Path(recipe.output).name,
            id=run_id(Path(recipe.output)),
            resume="allow" if is_online else None,
            mode=recipe.logging.wandb,
            dir=recipe.output,
            config=to_tree(recipe),
            settings=wandb.Settings(console="off", quiet=True, init_timeout=_START_SECONDS),
        )
        # a run that resumes makes some steps again, which W&B's own counter would refuse
        self._run.define_metric("*", step_metric="step")

    def _end(self, status: int) -> None:
        """Whoever has to stop the run cannot wait for a network."""
        if not self._run:
            return
        run = self._run
        thread = threading.Thread(target=self._attempt, args=(lambda: run.finish(exit_code=status),), daemon=True)
        thread.start()
        thread.join(_END_SECONDS)
        if thread.is_alive():
            warn(f"logging.wandb: not all is uploaded after {_END_SECONDS} seconds; wandb sync uploads the rest")
        self._run = None

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever it may be
            self._run = None
            warn(f"logging.wandb: {' '.join(str(error).split())[:300]}; the run goes on without Weights & Biases")


def run_id(output: Path) -> str:
    """The id of the W&B run, the same for all starts: in <output>/wandb_run_id."""
    path = output / "wandb_run_id"
    if path.is_file() and (there := path.read_text(encoding="utf-8").strip()):
        return there
    output.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
