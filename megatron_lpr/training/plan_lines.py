"""Lines of the text that describes a plan, from settings and numbers alone."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import yaml

from megatron_lpr.families import Architecture
from megatron_lpr.model.rank.frozen import frozen_bytes, shards_frozen
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.recipe.settings import Recipe


def frozen_lines(recipe: Recipe, arch: Architecture, ranks: int) -> Iterator[str]:
    """Where the frozen weights are, if there are any."""
    if not (whole := frozen_bytes(recipe, arch, ranks)):
        return
    if shards_frozen(recipe, arch, ranks):
        own = decimal_size(frozen_bytes(recipe, arch, ranks, sharded=True))
        yield f"frozen       sharded: {own} on a rank, where a copy is {decimal_size(whole)}"
    else:
        yield f"frozen       replicated: {decimal_size(whole)} on a rank"


def differing(config: Any) -> dict[str, Any]:
    """The settings that are not what they are without a word in the recipe, as plain dicts and lists."""
    tree = {}
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            tree[field.name] = differing(value) if dataclasses.is_dataclass(value) else to_tree(value)
    return tree


def decimal_size(number_of_bytes: int) -> str:
    """In the decimal units that disks are sold in."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number_of_bytes >= size:
            return f"{number_of_bytes / size:.1f} {unit}"
    return f"{number_of_bytes / 1e3:.1f} KB"


def one_line(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.split("\n")[0]
