"""What is as it should be in a mapping that somebody may have edited, and what is wrong with the rest."""

import dataclasses
import typing
from typing import Any

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.reading import converted, to_tree
from megatron_lpr.recipe.sections import check_setting


def sound_part(cls: type, tree: Any, where: str, faults: list[str], prefix: str = "") -> dict[str, Any]:
    """The entries that are as dataclass or TypedDict `cls` declares them, as plain types; the others are left out.

    Of a list too it is the single entries.
    Whatever is missing stays so. Names that `cls` does not know are left out without a word: other versions have them.

    Args:
        where: begins each fault.
        faults: gets a line for each entry that is something else.
        prefix: the section's dotted name and a dot.
    """
    if not isinstance(tree, dict):
        section = f"{where}: {prefix.removesuffix('.')}" if prefix else where
        faults.append(f"{section}: expected a mapping, found {tree!r}")
        return {}
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for key in [key for key in hints if tree.get(key) is not None]:
        nested = next((h for h in (hints[key], *_members(hints[key])) if dataclasses.is_dataclass(h)), None)
        if nested is not None:
            found[key] = sound_part(typing.cast(type, nested), tree[key], where, faults, f"{prefix}{key}.")
            continue
        is_list = isinstance(tree[key], list) and typing.get_origin(hints[key]) in (tuple, list)
        hint = typing.get_args(hints[key])[0] if is_list else hints[key]
        kept = []
        for number, entry in enumerate(tree[key] if is_list else [tree[key]]):
            name = f"{prefix}{key}[{number}]" if is_list else f"{prefix}{key}"
            try:
                value = converted(hint, entry, where, name)
                if dataclasses.is_dataclass(cls):
                    check_setting(cls, key, value, f"{where}: {name}")
            except UserError as error:
                faults.append(str(error))
            else:
                kept.append(to_tree(value))
        if is_list or kept:
            found[key] = kept if is_list else kept[0]
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    """Of a union: a section may be left out."""
    return () if typing.get_origin(hint) in (tuple, list, dict) else typing.get_args(hint)
