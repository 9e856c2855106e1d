"""`model.dtype: auto`: chosen once for a run, and what was chosen is what its recipe says from then on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_lpr.errors import UserError
from megatron_lpr.platform import collected
from megatron_lpr.platform.fast_bfloat16 import fast_in_bfloat16
from megatron_lpr.recipe.settings import Recipe


def with_dtype(
    recipe: Recipe, run: Mapping[str, Any] | None = None, *, elsewhere: bool = False
) -> tuple[Recipe, str | None]:
    """The recipe with a dtype in the place of `auto`; and a line that says which and why, where one was chosen.

    Args:
        run: the recipe of the run that it goes on with, whose dtype it keeps.
        elsewhere: other machines will train.
    """
    if recipe.model.dtype != "auto":
        return recipe, None
    if run is not None:
        dtype, why = run["model"]["dtype"], "as the run began"
    elif elsewhere:
        dtype, why = "bfloat16", "as on GPUs; a processor is measured where it trains"
    else:
        is_fast, why = fast_in_bfloat16()
        dtype = "bfloat16" if is_fast else "float32"
    model = dataclasses.replace(recipe.model, dtype=dtype)
    return dataclasses.replace(recipe, model=model), f"{dtype} (model.dtype: auto), {why}"


def check_same_dtype(dtype: str) -> None:
    """UserError, on all ranks, where they have chosen different ones."""
    if len(set(collected(lambda rank, ranks: [dtype]))) > 1:
        raise UserError(
            "model.dtype: auto chooses bfloat16 on some ranks and float32 on others, whose processors or GPUs are not "
            "fast in it; set one of the two"
        )
