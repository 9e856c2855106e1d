"""The recipe that a checkpoint carries: what is done to the checkpoint needs no other."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lpr.checkpoint.run_state import find_checkpoint, read_run_state
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.dtype import with_dtype
from megatron_lpr.recipe.reading import from_tree, load_recipe, to_tree
from megatron_lpr.recipe.settings import Recipe


def own_recipe(checkpoint: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the run that wrote a checkpoint, with `key.path=value` overrides.

    Raises:
        UserError: run.json cannot be read, an override is wrong, or the base model is not where the run found it.
    """
    saved = from_tree(Recipe, read_run_state(checkpoint).recipe, where=f"checkpoint {checkpoint}")
    recipe = load_recipe(None, overrides, under=to_tree(saved))
    base = recipe.model.base
    if base == saved.model.base and not Path(base).is_dir():
        raise UserError(
            f"checkpoint {checkpoint}: its base model was in {base}, which is not there now (seen from {Path.cwd()}); "
            "say where it lies with --base FOLDER or --set model.base=FOLDER"
        )
    return recipe


def with_dtype_of_run(
    recipe: Recipe, damaged: Mapping[str, str], *, elsewhere: bool = False
) -> tuple[Recipe, str | None]:
    """As `with_dtype`: a run that goes on from one of its checkpoints keeps its dtype, on whatever machine."""
    begun = find_checkpoint(recipe.output, damaged) if recipe.model.dtype == "auto" else None
    return with_dtype(recipe, read_run_state(begun.folder).recipe if begun else None, elsewhere=elsewhere)


def with_experts_of(recipe: Recipe, checkpoint: Path) -> Recipe:
    """A recipe of the model in a checkpoint: experts and dtype are the checkpoint's, whatever the recipe says."""
    saved = read_run_state(checkpoint).recipe["model"]
    kept = {key: saved[key] for key in ("num_experts", "num_frozen_experts", "topk", "dtype")}
    layers = tuple(saved["mlp_only_layers"])
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **kept, mlp_only_layers=layers))
