"""A plan whose checkpoint has been compared with its checksums, and that has room for the next, before anything is
built on it."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from megatron_lpr.checkpoint.run_state import step_folders
from megatron_lpr.checkpoint.source import chain
from megatron_lpr.checkpoint.verification import refuse_damaged, verify_files
from megatron_lpr.files.output_place import check_place, free_bytes
from megatron_lpr.platform import same_on_all_ranks, together
from megatron_lpr.recipe.dtype import check_same_dtype
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.cost import model_size
from megatron_lpr.training.plan import Plan, plan_training


def plan_on_good_checkpoint(recipe: Recipe, world_size: int) -> Plan:
    """As `plan_training`, on all ranks alike, from the newest checkpoint of the run that is not damaged.

    Raises:
        UserError: every checkpoint of the run is damaged, or that of `model.load` which gives it weights; whatever else
            is wrong.
    """
    contents, damaged = recipe.checkpoint.verify, dict[str, str]()
    while True:
        plan = together(functools.partial(_planned, recipe, world_size, dict(damaged)))
        if plan.dtype:
            check_same_dtype(plan.recipe.model.dtype)
        same_on_all_ranks("the checkpoint to go on from", str(plan.resume))
        folder = plan.resume or plan.source
        if folder is None:
            return plan
        if plan.resume is None:
            refuse_damaged(folder, contents=contents)
            return plan
        fault = verify_files(folder, contents=contents)
        if not fault:
            if not plan.finished:
                for below in chain(folder, recipe.model.load)[1:]:
                    refuse_damaged(below, contents=contents)
            return plan
        damaged[folder.name] = fault


def _planned(recipe: Recipe, world_size: int, damaged: dict[str, str]) -> Plan:
    plan = plan_training(recipe, world_size, damaged)
    if not plan.finished:
        root = Path(recipe.output) / "checkpoints"
        check_place(root, needed=largest_checkpoint(plan))
        plan = dataclasses.replace(plan, notes=(*plan.notes, *short_of_room(plan, root)))
    return plan


def short_of_room(plan: Plan, root: Path) -> Iterator[str]:
    """What `checkpoint.keep` takes beyond what is there: the newest ones, and the one that is being written."""
    settings = plan.recipe.checkpoint
    saves = settings.every or settings.every_minutes
    there = sum(file.stat().st_size for folder in step_folders(root) for file in folder.iterdir() if file.is_file())
    needed = (settings.keep + 1) * largest_checkpoint(plan) - there
    free = free_bytes(root)
    if settings.keep and saves and needed > free:
        yield (
            f"checkpoint.keep: {settings.keep} checkpoints and the one being written take {needed / 1e9:.1f} GB more "
            f"in {root}, which has {free / 1e9:.1f} GB free"
        )


def largest_checkpoint(plan: Plan) -> int:
    """The bytes of the larger one of a checkpoint on the way and the last."""
    size, settings = model_size(plan.recipe, plan.arch), plan.recipe.checkpoint
    last = size.weight_bytes[plan.content(finished=True)] + size.optimizer_bytes * settings.final_optimizer
    return max(last, size.checkpoint_bytes(plan.content(finished=False)))
