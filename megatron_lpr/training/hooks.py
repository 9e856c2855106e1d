"""What happens around the training loop: each concern is a hook.

    class Halfway(Hook):
        def after_step(self, trainer, metrics):
            if 2 * metrics["step"] == metrics["steps"] and dist.get_rank() == 0:
                print("half of it is done, the loss is", metrics["ntp_loss"])

    Trainer(plan, hooks=[Halfway()]).run()

Hooks of your own (Weights & Biases, a watchdog, a profiler) are called after those that every run has. This module can
be imported before Megatron.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.distributed as dist
import yaml

from megatron_lpr.checkpoint.same_run import changed_settings
from megatron_lpr.errors import UserError
from megatron_lpr.files.file_tensor import tensor_bytes
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.reporting.metrics_log import MetricsLog, StepMetrics, each_record
from megatron_lpr.reporting.progress import Progress
from megatron_lpr.training.plan import Plan
from megatron_lpr.training.starts import record_start

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from megatron_lpr.model.lpr_router import LPRRouter


class RunningTrainer(Protocol):
    """What a hook may use of its `Trainer` (train.py says what each is)."""

    plan: Plan
    recipe: Recipe
    chunks: list[torch.nn.Module]
    routers: list["LPRRouter"]
    optimizer: "MegatronOptimizer"
    hooks: list["Hook"]
    step: int
    consumed_samples: int
    tokens_seen: Counter[str]

    @property
    def finished(self) -> bool: ...

    def save(self, *, with_optimizer: bool = True) -> Path: ...


class Hook:
    """Called by the trainer on every rank, in the order of the hooks; override what you need.

    As all ranks call it, a hook may use collectives, and one that prints or writes does so on rank 0 alone. Metrics
    are plain numbers, the same on every rank: reading them waits for nothing. What a hook raises ends the run.
    """

    def start(self, trainer: RunningTrainer) -> None:
        """Before the first step of this start of the run."""

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        """After every optimizer step; `trainer.step` counts it already."""

    def before_save(self, trainer: RunningTrainer) -> None:
        """Before a checkpoint is written; what is raised here leaves it unwritten."""

    def after_save(self, trainer: RunningTrainer, folder: Path) -> None:
        """When the checkpoint is whole and on the disk."""

    def finish(self, trainer: RunningTrainer) -> None:
        """After the last step and its checkpoint."""

    def fail(self, trainer: RunningTrainer, error: BaseException) -> None:
        """Instead of `finish`, where an error or Ctrl-C ends the run; no collectives, for other ranks may be gone."""


@contextlib.contextmanager
def failure_told(trainer: RunningTrainer) -> Iterator[None]:
    """What ends the run inside it is told to every hook; what one raises then is printed, and does not hide it."""
    try:
        yield
    except BaseException as error:
        for hook in trainer.hooks:
            try:
                hook.fail(trainer, error)
            except Exception as second:
                print(f"warning: {type(hook).__name__}: {second}", flush=True)
        raise


def built_in(trainer: RunningTrainer) -> list[Hook]:
    """What every run does, before the hooks that are its own."""
    plots = [Plots()] if dist.get_rank() == 0 else []
    return [FrozenWeights(trainer.chunks), Announcement(), Starts(), Metrics(), Checkpoints(), *plots]


class FrozenWeights(Hook):
    """A frozen weight that is not what it was when the trainer was built is a bug, and nothing is saved with it."""

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        self.before = fingerprint(chunks)

    def before_save(self, trainer: RunningTrainer) -> None:
        assert fingerprint(trainer.chunks) == self.before, "a frozen weight has changed"


class Announcement(Hook):
    """Writes the resolved recipe, and prints what a resumed run changes and how much this rank learns."""

    def start(self, trainer: RunningTrainer) -> None:
        from megatron_lpr.training.optimizer import optimizer_parameters, trainable_parameters

        if dist.get_rank() != 0:
            return
        plan, recipe = trainer.plan, trainer.recipe
        path = plan.recipe_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
        if plan.state:
            print(f"resumes at step {trainer.step} from {plan.resume}")
            for change in changed_settings(recipe, plan.state):
                print(f"  changed: {change}")
        total = sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters())
        print(
            f"parameters on rank 0: {total:,}, trainable {trainable_parameters(trainer.chunks):,}, "
            f"in its optimizer {optimizer_parameters(trainer.optimizer):,}",
            flush=True,
        )


class Starts(Hook):
    """A line of starts.jsonl."""

    def start(self, trainer: RunningTrainer) -> None:
        record_start(trainer.recipe.output, step=trainer.step)


class Metrics(Hook):
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

    def finish(self, trainer: RunningTrainer) -> None:
        if self._log:
            self._log.close()

    def fail(self, trainer: RunningTrainer, error: BaseException) -> None:
        self.finish(trainer)


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


class Plots(Hook):
    """Losses and routing of the whole run, earlier starts included; the model is saved, whatever becomes of them."""

    def finish(self, trainer: RunningTrainer) -> None:
        try:
            folder = plot_run(trainer.recipe)
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
    losses = [cast(StepMetrics, {key: record.get(key) for key in ("step", *LOSSES)}) for record in each_record(metrics)]
    plot_losses({recipe.name: losses}, folder / "losses.png")
    if shares := first_and_last(each_record(metrics)):
        model = recipe.model
        largest = min(model.num_frozen_experts, model.topk) / model.topk
        plot_frozen_share(shares, folder / "frozen_share.png", max_share=largest)
    return folder


def fingerprint(chunks: Iterable[torch.nn.Module]) -> str:
    """SHA-256 over names and bytes of this rank's frozen parameters."""
    digest = hashlib.sha256()
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                digest.update(f"{index}.{name}".encode())
                digest.update(tensor_bytes(parameter))
    return digest.hexdigest()
