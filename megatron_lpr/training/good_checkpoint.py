"""A plan whose checkpoint has been compared with its checksums, before anything is built on it."""

import dataclasses
import functools

from megatron_lpr.checkpoint.source import chain
from megatron_lpr.checkpoint.verification import has_checksums, refuse_damaged, verify_files
from megatron_lpr.platform import same_on_all_ranks, together
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.plan import Plan, plan_training


def plan_on_good_checkpoint(recipe: Recipe, world_size: int) -> Plan:
    """As `plan_training`, on all ranks alike, from the newest checkpoint of the run that is not damaged.

    Raises:
        UserError: every checkpoint of the run is damaged, or that of `model.load` which gives it weights; whatever else
            is wrong.
    """
    contents, damaged = recipe.checkpoint.verify, dict[str, str]()
    while True:
        plan = together(functools.partial(plan_training, recipe, world_size, dict(damaged)))
        same_on_all_ranks("the checkpoint to go on from", str(plan.resume))
        folder = plan.resume or plan.source
        if folder is None:
            return plan
        if plan.resume is None:
            refuse_damaged(folder, contents=contents)
            return _with_note(plan)
        fault = verify_files(folder, contents=contents)
        if not fault:
            if not plan.finished:
                for below in chain(folder, recipe.model.load)[1:]:
                    refuse_damaged(below, contents=contents)
            return _with_note(plan)
        damaged[folder.name] = fault


def _with_note(plan: Plan) -> Plan:
    folder = plan.resume or plan.source
    assert folder is not None
    if has_checksums(folder):
        return plan
    note = f"checkpoint {folder} is from before there were checksums: whether its files are damaged is not known"
    return dataclasses.replace(plan, notes=(*plan.notes, note))
