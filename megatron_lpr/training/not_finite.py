"""Numbers that are not finite: found before they reach a weight, traced to where they came from, and then what the
recipe says of them (train.on_not_finite)."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_lpr.errors import UserError, warn
from megatron_lpr.files.json_lines import JsonLines, complete_lines, from_json
from megatron_lpr.model.builder import named_weights
from megatron_lpr.model.fp8_rows import Fp8Rows
from megatron_lpr.platform.shards import own_part
from megatron_lpr.training.fault import Fault, find_fault
from megatron_lpr.training.hooks.hook import RunningTrainer
from megatron_lpr.training.step import RankLosses


class NotFinite(ArithmeticError):
    """A gradient norm, of all ranks alike."""

    def __init__(self, norm: float) -> None:
        super().__init__(f"the gradient norm is {norm}")
        self.norm = norm


def refuse_gradients_that_are_not_finite(optimizer: MegatronOptimizer) -> None:
    """Have `optimizer.step` raise NotFinite before it touches a weight; Megatron would first make them all NaN."""
    take = optimizer.get_grad_norm

    def finite_norm() -> float:
        norm = take()
        if not math.isfinite(norm):
            raise NotFinite(float(norm))
        return norm

    optimizer.get_grad_norm = finite_norm


def check_weights(chunks: Iterable[torch.nn.Module], where: str) -> None:
    """Raises UserError, on all ranks, where a weight of any of them is not finite; `where` it came from."""
    if found := not_finite_weight(chunks):
        raise UserError(f"{where}: {found} is not finite; convert or download it again, or take another checkpoint")


def not_finite_weight(chunks: Iterable[torch.nn.Module]) -> str | None:
    """A weight that is not finite, on whatever rank, as `the frozen weight ...`; collective, the same on all ranks."""
    names = [None] * dist.get_world_size()
    dist.all_gather_object(names, next(_own(chunks), None))
    return next((f"{name} (rank {rank})" if rank else name for rank, name in enumerate(names) if name), None)


def skip_or_stop(trainer: RunningTrainer, error: NotFinite, losses: RankLosses, *, lr: float) -> str:
    """What the recipe says of the step that `trainer` is making, which has changed nothing; all ranks call it.

    Returns:
        Why the step is skipped, in words; its samples are marked where they are to be.

    Raises:
        UserError: the run stops.
    """
    train, step = trainer.plan.train, trainer.step + 1
    weight = not_finite_weight(trainer.chunks)
    fault = Fault(what=str(error)) if weight else find_fault(trainer, error.norm, losses)
    for router in trainer.routers:
        router.stats.take()  # what it has seen of this step, once or twice
    is_last = trainer.skipped_steps >= train.max_skipped_steps
    if weight or train.on_not_finite == "stop" or is_last:
        trainer.finish_save()
    if weight or train.on_not_finite == "stop":
        raise explain(fault, step=step, weight=weight, lr=lr, saved=trainer.saved_step)
    if is_last:
        raise UserError(
            f"train.max_skipped_steps: {trainer.skipped_steps} of {step - 1} steps have been skipped, and at step "
            f"{step} {fault}; lower optimizer.lr (it was {lr:g}), look at the data, or raise it"
        )
    if dist.get_rank() == 0:
        if train.on_not_finite == "skip_and_mark":
            mark(Path(trainer.recipe.output) / "marked.jsonl", step, fault)
        warn(f"step {step} is skipped ({trainer.skipped_steps + 1} of at most {train.max_skipped_steps}): {fault}")
    return fault.what


def mark(path: Path, step: int, fault: Fault) -> None:
    """Add the documents that the fault comes from, those but that an earlier start has written for the same step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = [from_json(line) for line in complete_lines(path)] if path.exists() else []
    lines = JsonLines(path)
    for place in fault.documents:
        record = {"step": step, **place}
        if record not in there:
            lines.append(record, sync=True)
    lines.close()


def explain(fault: Fault, *, step: int, weight: str | None, lr: float, saved: int | None) -> UserError:
    """What to tell when `step` ended in a fault.

    Args:
        weight: as `not_finite_weight` names it.
        saved: the step of the last checkpoint, if any.
    """
    if weight and weight.startswith("the frozen"):
        cause = f"{weight} is not finite: look at the base model and the memory of the machine"
    elif fault.has_passed:
        cause = "look at the memory of the machines, or set train.on_not_finite: skip"
    else:
        at_fault = f"{weight} is not finite any more; " if weight else ""
        skip = "" if weight else ", set train.on_not_finite: skip"
        cause = (
            f"{at_fault}lower optimizer.lr (it was {lr:g}) or optimizer.clip_grad{skip}, or look at what the step "
            f"reads (megatron-lpr inspect-data RECIPE --step {step})"
        )
    again = f"the run goes on from its checkpoint of step {saved}"
    if saved is None:
        again = "there is no checkpoint yet, so the run starts from its first step (checkpoint.every saves on the way)"
    return UserError(f"step {step}: {fault}: {cause}; started again, {again}")


def _own(chunks: Iterable[torch.nn.Module]):
    for name, parameter in named_weights(chunks):
        values = own_part(parameter)
        if not torch.isfinite(values.dequantize() if isinstance(values, Fp8Rows) else values).all():
            yield f"the {'trained' if parameter.requires_grad else 'frozen'} weight {name}"
