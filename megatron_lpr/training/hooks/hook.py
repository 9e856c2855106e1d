"""What happens around the training loop: each concern is a hook.

    class Halfway(Hook):
        def after_step(self, trainer, metrics):
            if 2 * metrics["step"] == metrics["steps"] and dist.get_rank() == 0:
                print("half of it is done, the loss is", metrics["ntp_loss"])

    megatron_lpr.train(plan, hooks=[Halfway()])

Hooks of your own are called after those that every run has (built_in.py). They can be imported before Megatron.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_lpr.errors import Stopped
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.training.plan import Plan
from megatron_lpr.training.votes import Votes

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from megatron_lpr.checkpoint.save import CheckpointWriter
    from megatron_lpr.losses import GlobalCounts
    from megatron_lpr.model.lpr_router import LPRRouter


class RunningTrainer(Protocol):
    """What a hook may use of its `Trainer` (train.py says what each is)."""

    plan: Plan
    recipe: Recipe
    chunks: list[torch.nn.Module]
    routers: list["LPRRouter"]
    counts: "GlobalCounts"
    optimizer: "MegatronOptimizer"
    hooks: list["Hook"]
    bytes_read: int
    step: int
    saved_step: int | None
    skipped_steps: int
    consumed_samples: int
    tokens_seen: Counter[str]
    votes: Votes
    writer: "CheckpointWriter"

    @property
    def finished(self) -> bool: ...

    def save(self, *, with_optimizer: bool = True, wait: bool = True) -> Path: ...

    def finish_save(self) -> Path | None: ...


class Hook:
    """Called by the trainer on every rank, in the order of the hooks; override what you need.

    A start of a run ends with one of `finish`, `stop` and `fail`.

    As all ranks call it, a hook may use collectives, and one that prints or writes does so on rank 0 alone. Metrics
    are plain numbers, the same on every rank: reading them waits for nothing. What a hook raises ends the run.
    """

    def start(self, trainer: RunningTrainer) -> None:
        """Before the first step of this start of the run."""

    def before_step(self, trainer: RunningTrainer) -> None:
        """Before every optimizer step; `trainer.step` does not count it yet."""

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        """After every optimizer step; `trainer.step` counts it already."""

    def before_save(self, trainer: RunningTrainer) -> None:
        """Before a checkpoint is written, with the newest weights in place; what is raised here leaves it unwritten."""

    def after_save(self, trainer: RunningTrainer, folder: Path) -> None:
        """When the checkpoint is whole and on the disk; `trainer` may have made steps since its step, saved_step."""

    def finish(self, trainer: RunningTrainer) -> None:
        """After the last step and its checkpoint."""

    def stop(self, trainer: RunningTrainer) -> None:
        """Instead of `finish`, where a signal or the end of its time stops the run; its checkpoint is written."""

    def fail(self, trainer: RunningTrainer, error: BaseException) -> None:
        """Instead of `finish`, where an error ends the run; no collectives, for other ranks may be gone."""


class EndsAlike(Hook):
    """One that does the same however the run ends."""

    def end(self, trainer: RunningTrainer) -> None:
        """For `finish`, `stop` and `fail`."""

    def finish(self, trainer: RunningTrainer) -> None:
        self.end(trainer)

    def stop(self, trainer: RunningTrainer) -> None:
        self.end(trainer)

    def fail(self, trainer: RunningTrainer, error: BaseException) -> None:
        self.end(trainer)


def is_validated(trainer: RunningTrainer, step: int) -> bool:
    """Whether held-out text is scored after a step (validation.py)."""
    every = trainer.recipe.evaluation.every
    return bool(every) and (step % every == 0 or step == trainer.plan.train.steps)


@contextlib.contextmanager
def failure_told(trainer: RunningTrainer) -> Iterator[None]:
    """What ends the run inside it is told to every hook; what one raises then is printed, and does not hide it."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        for hook in trainer.hooks:
            try:
                hook.fail(trainer, error)
            except Exception as second:
                print(f"warning: {type(hook).__name__}: {second}", flush=True)
        raise
