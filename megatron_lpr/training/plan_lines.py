"""Lines of the text that describes a plan, from settings and numbers alone."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import yaml

from megatron_lpr.families import Architecture
from megatron_lpr.model.rank.frozen import frozen_bytes, shards_frozen
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.recipe.settings import Recipe

# of metrics.jsonl, about: a number of a layer's statistics; of a language in each step, and of its summary
_BYTES_OF_NUMBER, _BYTES_OF_LANGUAGE, _BYTES_OF_SUMMARY = 22, 45, 310
_LONG_LOG = 20 * 10**9


def frozen_lines(recipe: Recipe, arch: Architecture, ranks: int) -> Iterator[str]:
    """Where the frozen weights are, if there are any."""
    if not (whole := frozen_bytes(recipe, arch, ranks)):
        return
    if shards_frozen(recipe, arch, ranks):
        own = decimal_size(frozen_bytes(recipe, arch, ranks, sharded=True))
        yield f"frozen       sharded: {own} on a rank, where a copy is {decimal_size(whole)}"
    else:
        yield f"frozen       replicated: {decimal_size(whole)} on a rank"


def long_log(recipe: Recipe, arch: Architecture, languages: int) -> Iterator[str]:
    """A warning of a metrics.jsonl that fills disks, where languages, layers and experts are many."""
    assert recipe.train is not None
    steps, logging, experts = recipe.train.steps, recipe.logging, recipe.model.num_experts
    layers = len(arch.moe_layers()) if experts else 0
    of_layers = _BYTES_OF_NUMBER * languages * layers * (experts + 2)
    every_step = languages * (_BYTES_OF_LANGUAGE + (_BYTES_OF_SUMMARY if layers else 0) // logging.router_every)
    size = steps * every_step + of_layers * (steps // logging.router_layers_every + 2)
    if size > _LONG_LOG:
        yield (
            f"metrics.jsonl will have some {decimal_size(size)}, {decimal_size(of_layers)} of them with each record of "
            f"every layer: raise logging.router_layers_every ({logging.router_layers_every}) and logging.router_every "
            f"({logging.router_every})"
        )


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
