"""Recipes from YAML and dotted overrides, and back; what is no recipe, or has no effect, ends in one sentence."""

import contextlib
import copy
import dataclasses
import math
import os
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_lpr.errors import UserError, nearest
from megatron_lpr.files.json_lines import printable
from megatron_lpr.files.yaml_io import parse_yaml, read_yaml
from megatron_lpr.recipe.fields import Range
from megatron_lpr.recipe.sections import check_section
from megatron_lpr.recipe.settings import Recipe

T = TypeVar("T")

# Under a recipe for a command that needs neither a run nor its model: what the recipe may leave out.
REST: dict[str, Any] = {"name": "", "output": ".", "model": {"base": ""}}


def load_recipe(
    path: str | Path | None, overrides: Sequence[str] = (), under: Mapping[str, Any] = types.MappingProxyType({})
) -> Recipe:
    """Read `path`, lay it over its `include`, apply `key.path=value` overrides, and check names, types and ranges.

    All of it lies over `under`, which is the whole recipe where there is no `path`.

    Raises:
        UserError: no such file, no mapping, and as `from_tree`.
    """
    if isinstance(overrides, str):  # a sequence, of letters
        raise UserError(f"override '{overrides}': overrides are a list, as ['{overrides}']")
    tree = _merge(copy.deepcopy(dict(under)), {} if path is None else _read(Path(path), including=()))
    for override in overrides:
        _override(tree, override)
    return from_tree(Recipe, tree, where=str(path or "command line"))


def to_tree(config: Any) -> Any:
    """A dataclass as plain dicts and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_tree(item) for item in config]
    return dict(config) if isinstance(config, Mapping) else config


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def _read(path: Path, including: tuple[str, ...]) -> dict[str, Any]:
    if os.path.isdir(path):
        raise UserError(f"recipe {path}: a folder; give the YAML file of a recipe")
    if not os.path.exists(path):
        raise UserError(f"recipe {path}: no such file")
    identity = os.path.realpath(path)
    if identity in including:
        raise UserError(f"recipe {path}: includes itself")
    tree = read_yaml(path, f"recipe {path}")
    if tree is None:
        raise UserError(f"recipe {path}: is empty; a recipe has at least name, output and model")
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: expected a mapping of sections, found {type(tree).__name__}")
    _refuse_empty(tree, f"recipe {path}")
    include = tree.pop("include", None)
    if include is None:
        return tree
    if not isinstance(include, str):
        raise UserError(f"recipe {path}: include names one file, as include: common.yaml, not {include!r}")
    return _merge(_read(path.parent / include, (*including, identity)), tree)


def _merge(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    merged = under | over
    return merged | {key: _merge(under[key], over[key]) for key in under.keys() & over.keys()}


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': expected section.key=value, as optimizer.lr=1e-4")
    if not value.strip():  # a variable of the shell that nobody set; YAML would read it as null
        raise UserError(f"override '{override}': has no value; give one, or null for none")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override '{override}': '{parent}' is a value, not a section")
    tree[leaf] = parse_yaml(value, f"override '{override}'")
    _refuse_empty(tree[leaf], f"override '{override}'", key)


def _refuse_empty(tree: Any, where: str, name: str = "") -> None:
    """UserError where a text is empty: it would be taken for a setting that is left out, or for the current folder."""
    if isinstance(tree, str) and not tree.strip():
        raise UserError(f"{where}: {name}: is empty; give it a value, or leave it out")
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_empty(value, where, f"{name}.{key}" if name else str(key))
    if isinstance(tree, list):
        for index, value in enumerate(tree):
            _refuse_empty(value, where, f"{name}[{index}]")


def from_tree(cls: type[T], tree: Any, where: str) -> T:
    """Build dataclass `cls` from plain dicts; `where` names the place in messages.

    Raises:
        UserError: unknown key (names the nearest), wrong type, missing required key, and as `check_section`.
    """
    built: T = _build(cls, tree, where, "")
    try:
        check_section(built)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return built


def _build(cls: type, tree: Any, where: str, prefix: str) -> Any:
    """`prefix` is the section's dotted name and a dot."""
    section = f"{where}: {prefix.removesuffix('.')}" if prefix else where
    if not isinstance(tree, dict):
        raise UserError(f"{section}: expected a mapping, found {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            hint = _in_another_section(str(key), cls) or nearest(str(key), fields)
            raise UserError(f"{section}: unknown key '{key}'{hint}")
    for name, f in fields.items():
        no_default = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in tree and no_default:
            doc = f" ({f.metadata['doc']})" if "doc" in f.metadata else ""
            raise UserError(f"{section}: missing key '{name}'{doc}")
    return cls(**{key: converted(hints[key], value, where, f"{prefix}{key}") for key, value in tree.items()})


def _in_another_section(name: str, cls: type) -> str:
    """Where a recipe has a setting whose section was left out or mistaken: a hint as `nearest`, or nothing."""
    hints = typing.get_type_hints(Recipe).items()
    kinds = [(section, kind) for section, hint in hints for kind in (hint, *typing.get_args(hint))]
    sections = {section: kind for section, kind in kinds if dataclasses.is_dataclass(kind)}
    if cls not in (Recipe, *sections.values()):
        return ""
    found = [section for section, kind in sections.items() if name in {f.name for f in dataclasses.fields(kind)}]
    names = " or ".join(f"'{section}.{name}'" for section in found)
    return f"; did you mean {names}?" if found else ""


def converted(hint: Any, value: Any, where: str, name: str) -> Any:
    """`value` as `hint`; YAML reads 1e-4 as a string and 1 as an int, so numbers are converted, not only checked.

    Raises:
        UserError: it is something else; begins with `where` and `name`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return converted(next(a for a in arguments if a is not type(None)), value, where, name)
    if value is None:
        raise UserError(f"{where}: {name}: is empty (null); give it a value, or leave it out")
    if origin is typing.Literal:
        if isinstance(value, bool):
            # YAML reads the words true, on and off as bools
            word = "on" if value else "off"
            value = word if word in arguments else str(value).lower()
        if value not in arguments:
            raise UserError(f"{where}: {name}: unknown value '{value}'{nearest(str(value), arguments)}")
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, f"{name}.")
    if origin in (tuple, list):
        items = value if isinstance(value, list) else [value]
        return origin(converted(arguments[0], item, where, f"{name}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name}: expected a mapping, found {value!r}")
        if odd := [key for key in value if isinstance(key, bool) or key is None]:
            word = "a bool" if isinstance(odd[0], bool) else "null"
            raise UserError(f"{where}: {name}: YAML reads one of its keys as {word}; write it in quotes, as 'no'")
        names = {key: printable(str(key)) for key in value}
        return {names[key]: converted(arguments[1], item, where, f"{name}.{key}") for key, item in value.items()}
    return _scalar(hint, value, f"{where}: {name}")


def _scalar(hint: type, value: Any, where: str) -> Any:
    found = str(value).lower() if isinstance(value, bool) else repr(value)  # as YAML writes it
    quotes = "; write it in quotes" if hint is str and isinstance(value, bool | float) else ""
    wrong = UserError(f"{where}: expected {hint.__name__}, found {found}{quotes}")
    if hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
        raise wrong
    if hint is str:
        if isinstance(value, str | int):
            return printable(str(value))
        raise wrong  # of a float, which may have been written otherwise: 1.10 is 1.1
    if hint is int:  # directly, for a float cannot hold every int
        if isinstance(value, int):
            return value
        with contextlib.suppress(ValueError):
            return int(value if isinstance(value, str) else "")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number) or (hint is int and not number.is_integer()):
        raise wrong
    return hint(number)


def describe(cls: type = Recipe, prefix: str = "", only: Collection[str] | None = None) -> list[str]:
    """For each setting `section.key: type = default (range)` and, below, its sentence: the body of `--help`.

    Args:
        only: what is described, sections or single settings by their dotted names; all without it.
    """
    lines: list[str] = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        nested = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        name = f"{prefix}{f.name}"
        if nested is not None:
            many = typing.get_origin(hint) is tuple
            lines += describe(typing.cast(type, nested), f"{name}[]." if many else f"{name}.", only)
            continue
        if only is not None and not any(name == one or name.startswith((f"{one}.", f"{one}[].")) for one in only):
            continue
        if f.default is not dataclasses.MISSING:
            default = f" = {f.default}"
        elif f.default_factory is not dataclasses.MISSING:
            default = f" = {f.default_factory()}"
        else:
            default = " (required)"
        literal = typing.get_origin(hint) is typing.Literal
        type_name = "|".join(map(str, typing.get_args(hint))) if literal else getattr(hint, "__name__", str(hint))
        if typing.get_args(hint) and not literal:
            type_name = str(hint).replace("typing.", "")
        stated = f.metadata["range"]
        bounds = f" ({stated})" if stated != Range() else ""
        lines.append(f"  {name}: {type_name}{default}{bounds}\n      {f.metadata['doc']}")
    return lines
