"""Numbers that are not finite: found before they reach a weight, and traced to one where a weight is the cause."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_lpr.errors import UserError
from megatron_lpr.model.builder import named_weights


class NotFinite(ArithmeticError):
    """A loss or a gradient norm, of all ranks alike."""


def refuse_gradients_that_are_not_finite(optimizer: MegatronOptimizer) -> None:
    """Have `optimizer.step` raise NotFinite before it touches a weight; Megatron would first make them all NaN."""
    take = optimizer.get_grad_norm

    def finite_norm() -> float:
        norm = take()
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient norm is {norm}")
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


def explain(error: NotFinite, step: int, chunks: Iterable[torch.nn.Module], lr: float, saved: int | None) -> UserError:
    """What to tell when `step` ended in `error`; collective. `saved`: the step of the last checkpoint, if any."""
    weight = not_finite_weight(chunks)
    if weight and weight.startswith("the frozen"):
        cause = f"{weight} is not finite: look at the base model and the memory of the machine"
    else:
        at_fault = f"{weight} is not finite any more; " if weight else ""
        cause = (
            f"{at_fault}lower optimizer.lr (it was {lr:g}) or optimizer.clip_grad, or look at what the step reads "
            f"(megatron-lpr inspect-data RECIPE --step {step})"
        )
    again = f"the run goes on from its checkpoint of step {saved}"
    if saved is None:
        again = "there is no checkpoint yet, so the run starts from its first step (checkpoint.every saves on the way)"
    return UserError(f"step {step}: {error}: {cause}; started again, {again}")


def _own(chunks: Iterable[torch.nn.Module]):
    for name, parameter in named_weights(chunks):
        if not torch.isfinite(parameter).all():
            yield f"the {'trained' if parameter.requires_grad else 'frozen'} weight {name}"
