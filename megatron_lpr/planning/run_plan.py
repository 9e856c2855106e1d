"""A recipe on so many GPUs: its own layout, the best ones, and what the model comes to in any."""

import dataclasses
from dataclasses import dataclass

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.planning.hardware import GPU, gpu_named
from megatron_lpr.planning.layout import Layout, Layouts
from megatron_lpr.planning.search import Found, search
from megatron_lpr.recipe.checks import architecture_of, check_recipe
from megatron_lpr.recipe.dtype import with_dtype
from megatron_lpr.recipe.settings import LoggingConfig, ParallelConfig, Recipe
from megatron_lpr.training.cost import ModelSize, model_size


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """own: the layout that the recipe says; None where these GPUs cannot have it, for the reason `refused`."""

    recipe: Recipe
    arch: Architecture
    world_size: int
    gpu: GPU
    size: ModelSize
    own: Layout | None
    refused: str | None
    found: Found


def plan_run(
    recipe: Recipe, world_size: int, gpu_name: str, *, gigabytes: float | None = None, most: int = 10
) -> RunPlan:
    """From the recipe and the base's config.json alone.

    Args:
        gigabytes: of a GPU, where it has not as much as the one of that name.
        most: layouts in the table.

    Raises:
        UserError: the recipe is wrong in any layout.
    """
    gpu = gpu_named(gpu_name, gigabytes)
    if world_size < 1:
        raise UserError(f"--gpus {world_size}: at least 1")
    if recipe.fp8.recipe != "none" and "fp8" not in gpu.flops:
        raise UserError(f"--gpu {gpu_name}: does not compute in FP8; set fp8.recipe: none, or plan for another GPU")
    if recipe.train is None:
        raise UserError("train: missing; the recipe describes no training run that could be planned")
    arch = architecture_of(recipe.model)
    recipe = _without_this_machine(recipe)
    check_recipe(dataclasses.replace(recipe, parallel=ParallelConfig()), arch, 1)
    assert recipe.train is not None
    own = refused = None
    try:
        check_recipe(recipe, arch, world_size)
    except UserError as error:
        refused = str(error)
    else:
        own = Layouts(recipe, arch, world_size, gpu).layout(recipe.train)
    return RunPlan(
        recipe=recipe,
        arch=arch,
        world_size=world_size,
        gpu=gpu,
        size=model_size(recipe, arch),
        own=own,
        refused=refused,
        found=search(recipe, arch, world_size, gpu, most),
    )


def _without_this_machine(recipe: Recipe) -> Recipe:
    """A plan logs nothing, and rehearses without DeepEP, whose rows it counts as those of `alltoall`."""
    dispatcher = "alltoall" if recipe.parallel.dispatcher == "flex" else recipe.parallel.dispatcher
    parallel = dataclasses.replace(recipe.parallel, dispatcher=dispatcher)
    recipe, _ = with_dtype(recipe, elsewhere=True)
    return dataclasses.replace(recipe, logging=LoggingConfig(), parallel=parallel)
