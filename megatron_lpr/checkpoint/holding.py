"""What a checkpoint holds, and what it leaves to the base model or to the checkpoint that its run started from.

    whole            every weight
    over base        routers and new experts; every other weight is the base's, bit for bit
    over checkpoint  routers; every other weight is that of the checkpoint in model.load

The state of the optimizer, where there is one, is that of what trains.
"""

from collections.abc import Mapping
from typing import Any, Literal

from megatron_lpr.recipe.settings import Recipe

Content = Literal["whole", "over base", "over checkpoint"]
# Parts of the names of parameters, Megatron's and those of its checkpoints alike.
_HELD: dict[Content, tuple[str, ...]] = {
    "whole": ("",),
    "over base": (".mlp.router.", ".mlp.experts."),
    "over checkpoint": (".mlp.router.",),
}
CONTENTS: tuple[Content, ...] = ("whole", "over base", "over checkpoint")


def holds(content: Content, name: str) -> bool:
    """Whether a checkpoint of this content holds the parameter `name`."""
    return any(part in name for part in _HELD[content])


def content_of(recipe: Recipe, *, frozen_is_base: bool, on_checkpoint: bool, finished: bool) -> Content:
    """What a checkpoint of a run holds.

    Args:
        frozen_is_base: `frozen_is_base` of the run.
        on_checkpoint: the checkpoint in model.load, from which the run has its weights, is there.
        finished: it is the checkpoint of the run's last step, which others read: it needs no other checkpoint, but
            where frozen weights are held in FP8.
    """
    if recipe.checkpoint.whole or not recipe.model.num_experts:
        return "whole"
    learns_routers = recipe.train is not None and recipe.train.trainable == "routers"
    # new experts that were quantised are not those that the checkpoint in model.load holds, so never written
    if learns_routers and (recipe.fp8.frozen_weights == "fp8" or (on_checkpoint and not finished)):
        return "over checkpoint"
    return "over base" if frozen_is_base else "whole"


def frozen_is_base(
    recipe: Recipe, below: Mapping[str, Any] | None, there: Mapping[str, Any] | None, base_dtype: str
) -> bool:
    """Whether every weight of a run but routers and new experts is the base's, cast to the dtype of the run.

    Args:
        below: the recipe of the checkpoint that the run goes on from, its own or another; None: it starts at the base.
        there: the base that this checkpoint names. It names the files only where its own frozen weights are the base's.
        base_dtype: of the base's files.
    """
    if not recipe.model.num_experts or (recipe.train is not None and recipe.train.trainable == "all"):
        return False
    if below is None:
        return True
    assert there is not None  # every checkpoint names its base
    if not there.get("files"):
        return False
    # weights that were rounded on the way are not those that come of the base at once
    return below["model"]["dtype"] in ("float32", recipe.model.dtype, base_dtype)
