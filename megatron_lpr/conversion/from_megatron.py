"""A Megatron checkpoint to a Hugging Face folder.

Import it after `platform.prepare()`.
"""

from megatron_lpr.config import Recipe
from megatron_lpr.conversion.export import export_model
from megatron_lpr.conversion.origins import with_shared_expert
from megatron_lpr.conversion.verify import VerifyReport, verify_export
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.megatron_model import MegatronModel
from megatron_lpr.recipe_io import from_tree
from megatron_lpr.training.run_state import checkpoint_folder, read_run_state


def export_checkpoint(recipe: Recipe, checkpoint: str, out: str) -> VerifyReport:
    """Write `checkpoint` as a stock HF model and check the folder against the base model.

    Raises:
        UserError: the folder exists, the size is no size, or the disk is full.
    """
    model = MegatronModel(recipe, checkpoint)
    arch = with_shared_expert(model.arch, recipe.export.shared_expert_size)
    experts, dtype = model.recipe.model, recipe.export.dtype
    export_model(
        model.module.named_parameters(),
        arch,
        base_dir=recipe.model.base,
        out_dir=out,
        num_experts=experts.num_experts,
        num_frozen=experts.num_frozen_experts,
        topk=experts.topk,
        dtype=experts.dtype if dtype == "auto" else dtype,
        max_shard_bytes=parse_size(recipe.export.max_shard_size),
    )
    saved = from_tree(Recipe, read_run_state(checkpoint_folder(checkpoint)).recipe, where=checkpoint)
    return verify_export(out, recipe.model.base, num_frozen=saved.untouched_experts)


def parse_size(text: str) -> int:
    """Bytes of '500MB' or '4GB' (decimal units, as Hugging Face counts).

    Raises:
        UserError: neither a number nor a number with a unit.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size <= 0:
        raise UserError(f"export.max_shard_size: '{text}' is no size; write it as 500MB or 4GB")
    return size
