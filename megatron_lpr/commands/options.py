"""Arguments that several commands have, spelled the same in all of them, and the recipe that follows from them."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.errors import UserError, warn
from megatron_lpr.recipe.reading import load_recipe
from megatron_lpr.recipe.settings import Recipe

T = TypeVar("T")


def told_apart(names: Mapping[str, str], values: Mapping[str, T]) -> dict[str, T]:
    """values under the names of their sources, or under the sources where two have one name."""
    unique = len(set(names.values())) == len(names)
    return {names[source] if unique else source: value for source, value in values.items()}


def add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """RECIPE, --set and --dry-run."""
    nargs = "?" if optional else None
    parser.add_argument("recipe", metavar="RECIPE", nargs=nargs, help="YAML file; see the settings below")
    _add_set(parser)


def add_own_recipe(parser: argparse.ArgumentParser) -> None:
    """For a command that reads a checkpoint, which brings its recipe: --base, --recipe, --set and --dry-run."""
    parser.add_argument("--base", help="folder of the base model (default: where training found it)")
    parser.add_argument("--recipe", help="YAML file that is read in place of the checkpoint's own recipe")
    _add_set(parser)


def _add_set(parser: argparse.ArgumentParser) -> None:
    what = "override a setting, one of those below; may be given several times"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)
    add_dry_run(parser)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, do nothing")


def add_graft_delta(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--graft-delta", nargs=2, metavar=("BASE", "INSTRUCT"), help=what)


def typed_recipe(options: argparse.Namespace, under: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that was typed, with --set; all of it lies over `under`.

    Raises:
        UserError: as `load_recipe`; it is a checkpoint.
    """
    path = options.recipe
    if path is not None and ((Path(path) / "run.json").is_file() or (Path(path) / "checkpoints").is_dir()):
        own = Path(path) / "recipe.yaml"
        example = f", as {own}, which its run was started with" if own.is_file() else ""
        raise UserError(
            f"{path} is a checkpoint or the output folder of a run: give the YAML file of a recipe{example}"
        )
    return load_recipe(path, options.set, under or {})


def found_checkpoint(path: str, spelling: str) -> Path:
    """The checkpoint that was typed, or the newest of a run's output folder.

    Raises:
        UserError: there is none, or it is a file: a recipe, most probably.
    """
    refuse_file(path, spelling)
    return checkpoint_folder(path)


def refuse_file(path: str, spelling: str) -> None:
    """Raises UserError where a recipe was typed in the place of a folder."""
    if Path(path).is_file():
        raise UserError(f"{path} is a file, no folder: {spelling}")


def recipe_of(checkpoint: Path, options: argparse.Namespace, reads: Sequence[str]) -> Recipe:
    """The checkpoint's own recipe, or --recipe, with --base and --set.

    Raises:
        UserError: a --set that the command does not read, an unknown one; the base model is not where it was.
    """
    from megatron_lpr.checkpoint.own_recipe import own_recipe

    refuse_unread(options.set, reads)
    if options.recipe:
        return typed_recipe(with_base(options))
    return own_recipe(checkpoint, with_base(options).set)


def refuse_unread(overrides: Sequence[str], reads: Sequence[str]) -> None:
    """UserError where a setting was typed that the command does not read; a recipe may have what others read."""
    for override in _unread(overrides, reads):
        raise UserError(f"--set {override}: has no effect here, where {', '.join(reads)} of the recipe are read")


def warn_of_unread(overrides: Sequence[str], reads: Sequence[str]) -> None:
    """The same as a warning, for commands that are given the words of a training to look at it."""
    for override in _unread(overrides, reads):
        warn(f"--set {override}: has no effect here, where {', '.join(reads)} of the recipe are read")


def _unread(overrides: Sequence[str], reads: Sequence[str]) -> list[str]:
    def reaches(key: str) -> bool:  # a setting of a section that is read, or a section of which something is
        return any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in reads)

    return [override for override in overrides if "=" in override and not reaches(override.partition("=")[0])]


def with_base(options: argparse.Namespace) -> argparse.Namespace:
    """--base as an override."""
    base = [] if options.base is None else [f"model.base={json.dumps(options.base)}"]
    return argparse.Namespace(**vars(options) | {"set": [*options.set, *base], "base": None})
