"""A Hugging Face model, upcycled or as it is, as a checkpoint: each rank reads its part straight from the files."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_lpr.checkpoint.holding import Content, content_of
from megatron_lpr.errors import UserError, warn
from megatron_lpr.families import Architecture
from megatron_lpr.families.weights import open_weights
from megatron_lpr.model.load.upcycle import check_checkpoint
from megatron_lpr.platform import Ranks, megatron, together
from megatron_lpr.recipe.dtype import check_same_dtype, with_dtype
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.recipe.settings import Recipe


def import_hf(recipe: Recipe, *, dry_run: bool = False, progress: bool = False) -> Path:
    """Write the model of a recipe as a checkpoint (step 0) in its output; returns its folder.

    progress: show a bar, and say what was done, or in a dry run, which returns the output, what would be.

    Raises:
        UserError: before any process group: the model, a size or the output folder cannot be.
    """
    from megatron_lpr.checkpoint.run_folder import run_folder

    recipe, dtype = with_dtype(dataclasses.replace(recipe, data=None, train=None))
    if dtype:
        check_same_dtype(recipe.model.dtype)
    arch, base = together(lambda: _check(recipe))
    experts = f"{recipe.model.num_experts} experts per layer" if recipe.model.num_experts else "dense"
    if progress and dtype and Ranks.from_environment().rank == 0:
        print(f"dtype {dtype}")
    if dry_run:
        if progress:
            print(f"would convert {recipe.model.base} into {recipe.output}: {experts}")
        return Path(recipe.output)
    with run_folder(recipe.output, resume=None), megatron() as ranks:
        from megatron_lpr.checkpoint.base_files import BaseFiles
        from megatron_lpr.checkpoint.run_state import RunState
        from megatron_lpr.checkpoint.save import save_checkpoint
        from megatron_lpr.model.builder import build_model, init_model_parallel
        from megatron_lpr.model.load.weights import fill_weights
        from megatron_lpr.reporting.progress import byte_progress

        init_model_parallel(recipe.parallel)
        chunks = build_model(recipe, arch)
        content = _content(recipe)
        files = None if content == "whole" else BaseFiles(recipe.model.base, Path(recipe.output))
        total = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
        with byte_progress("convert", total, show=progress and ranks.rank == 0) as bar:
            fill_weights(recipe, arch, chunks, None, progress=bar.update)
        if files is not None:
            base["files"] = files.digests()
        state = RunState(
            step=0, consumed_samples=0, has_optimizer=False, recipe=to_tree(recipe), base=base, content=content
        )
        folder = save_checkpoint(recipe.output, state, chunks)
        if progress and ranks.rank == 0:
            print(f"converted {recipe.model.base}: {experts}, saved {folder}")
        return folder


def _content(recipe: Recipe) -> Content:
    return content_of(recipe, frozen_is_base=bool(recipe.model.num_experts), on_checkpoint=False, finished=True)


def _check(recipe: Recipe) -> tuple[Architecture, dict[str, Any]]:
    """What can be known before the work: UserError, and warnings; the architecture to build, the base's identity."""
    from megatron_lpr.checkpoint.run_state import find_checkpoint
    from megatron_lpr.checkpoint.same_run import base_identity
    from megatron_lpr.families.remarks import base_remarks, model_bytes, new_bytes
    from megatron_lpr.files.output_place import check_place
    from megatron_lpr.recipe.checks import architecture_of, check_machine, check_recipe

    model, ranks = recipe.model, Ranks.from_environment()
    arch = architecture_of(model)
    check_recipe(recipe, arch, ranks.world_size)
    check_machine(recipe)
    check_checkpoint(open_weights(model.base, arch), arch)
    needed = model_bytes(arch, model.num_experts, model.dtype)
    if _content(recipe) == "over base":
        needed = new_bytes(arch, model.num_experts, model.num_frozen_experts, model.dtype)
    check_place(recipe.output, model.base, needed=needed)
    if find_checkpoint(recipe.output):
        raise UserError(f"output: {recipe.output} already holds a checkpoint; choose another folder")
    for sentence in base_remarks(arch, model.base, dtype=model.dtype) if ranks.rank == 0 else ():
        warn(sentence)
    return arch, base_identity(model.base, arch)
