"""A plan's layout, rehearsed: what was planned of a rank beside what the rank of a rehearsal holds and sends."""

import dataclasses
from collections.abc import Iterator

from megatron_lpr.errors import UserError
from megatron_lpr.planning.layout import Layout
from megatron_lpr.planning.planned import planned
from megatron_lpr.planning.rehearsal import Part, Rehearsal, rehearse
from megatron_lpr.planning.run_plan import RunPlan
from megatron_lpr.recipe.settings import Fp8Config, Recipe


def rehearsed(plan: RunPlan, rank: int | None) -> str:
    """Rehearse a rank of the recipe's own layout if it fits, else of the best one, and tell what was found.

    rank: None is the fullest.

    Raises:
        UserError: no layout fits, or it has no such rank.
    """
    layout = _layout(plan)
    if rank is None:
        rank = layout.rank.place.rank
    elif not 0 <= rank < plan.world_size:
        raise UserError(f"--rank {rank}: ranks of {plan.world_size} GPUs are 0 to {plan.world_size - 1}")
    recipe = rehearsable(layout.recipe())
    [found] = rehearse([Part(recipe=recipe, arch=plan.arch, world_size=plan.world_size, rank=rank)])
    return "\n".join(_text(plan, recipe, rank, found))


def rehearsable(recipe: Recipe) -> Recipe:
    """The recipe as it is rehearsed: with Megatron's local modules, for Transformer Engine's kernels need memory."""
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, spec="local"), fp8=Fp8Config())


def _layout(plan: RunPlan) -> Layout:
    for layout in (plan.own, *plan.found.best):
        if layout is not None and layout.memory.total <= plan.gpu.usable:
            return layout
    raise UserError(
        f"--rehearse: no layout fits into {plan.world_size} x {plan.gpu.name}; plan with more or larger GPUs "
        "(--gpus, --gpu)"
    )


def _text(plan: RunPlan, recipe: Recipe, rank: int, found: Rehearsal) -> Iterator[str]:
    memory, traffic = planned(recipe, plan.arch, plan.world_size, rank)
    took = f"{found.seconds:.0f} s and {found.resident / 1e9:.2f} GB of this machine"
    yield f"rehearsed    rank {rank} of {plan.world_size}, with {took}"
    yield f"  {'memory, MB':30}{'planned':>14}{'rehearsed':>14}"
    for kind, held in vars(memory).items():
        real = vars(found.memory)[kind]
        if held or real:
            yield f"  {kind:30}{held / 1e6:>14,.2f}{real / 1e6:>14,.2f}"
    yield f"  {'sent in a step, MB':30}{'planned':>14}{'rehearsed':>14}"
    for key in sorted({*traffic, *found.traffic}):
        columns = (f"{of[key].bytes / 1e6:,.2f}" if key in of else "" for of in (traffic, found.traffic))
        yield f"  {', '.join(key):30}" + "".join(f"{column:>14}" for column in columns)
