"""Checkpoint folders and their run.json, readable without Megatron.

    <output>/checkpoints/step_00000024/   one checkpoint: Megatron's files, manifest.json and run.json
    <output>/checkpoints/latest           the name of the one that the run goes on from
    <output>/checkpoints/abandoned/       checkpoints that the run has turned back from; never read, never deleted
    <output>/checkpoints/damaged/         checkpoints that the run has passed over; the same

A checkpoint is complete when its run.json and its manifest are what was written, and every file of the manifest is
there. Whether the files hold what was written is the business of verification.py.
"""

import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_lpr.checkpoint.holding import Content
from megatron_lpr.checkpoint.manifest import MANIFEST, read_manifest, sealed
from megatron_lpr.checkpoint.shape import RunJson, misfit
from megatron_lpr.errors import UserError
from megatron_lpr.files import durable
from megatron_lpr.files.checksum import fault_of_file
from megatron_lpr.files.unexpanded import refuse_unexpanded

VERSION = 4  # of run.json
_STEP = re.compile(r"step_([0-9]{1,18})")
NONE_DAMAGED: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint says of its run."""

    step: int
    consumed_samples: int
    has_optimizer: bool
    recipe: dict[str, Any]  # resolved
    base: dict[str, Any]  # identity of the base model (same_run.py), and its files (base_files.py)
    data_state: dict[str, Any] | None = None  # of the replay sampler
    tokens_per_language: dict[str, int] | None = None  # since the start of the run
    skipped_steps: int = 0  # the same
    source: dict[str, Any] | None = None  # the checkpoint of model.load that the run started from (source.py)
    content: Content = "whole"  # what the checkpoint holds (holding.py)
    manifest: str | None = None  # SHA-256 of manifest.json; None before that is written
    version: int = VERSION


@dataclass(frozen=True)
class Found:
    """A checkpoint, and what to tell of the way to it: that `latest` or a newer checkpoint is damaged."""

    folder: Path
    note: str | None = None


def checkpoint_folder(path: str) -> Path:
    """The checkpoint that `path` means: one itself, or the newest of a run's output folder (`locate`, said aloud)."""
    from megatron_lpr.platform import Ranks  # with torch, which what reads only the state of a run does without

    found = locate(path)
    if found.note and Ranks.from_environment().rank == 0:
        print(f"note: {found.note}", file=sys.stderr, flush=True)
    return found.folder


def locate(path: str) -> Found:
    """The checkpoint that `path` means: one itself, or the newest of a run's output folder.

    Raises:
        UserError: there is none, or none that is complete.
    """
    folder = Path(path)
    if (folder / "run.json").is_file() or _STEP.fullmatch(folder.name) and folder.is_dir():
        if missing := what_is_missing(folder):
            raise UserError(f"checkpoint {path}: not complete ({missing}); give another checkpoint of the run")
        return Found(folder)
    if found := find_checkpoint(path):
        return found
    refuse_unexpanded(path)
    what = "no checkpoint there (no run.json, no checkpoints/latest)" if folder.exists() else "no such folder"
    raise UserError(f"checkpoint {path}: {what}; give the output folder of a run or one of its checkpoints")


def find_checkpoint(output: str, damaged: Mapping[str, str] = NONE_DAMAGED) -> Found | None:
    """The checkpoint that a run goes on from: what `latest` names, or else the newest complete one before that, or
    after; None in a folder without checkpoints.

    Args:
        damaged: checkpoints that are passed over, by name, and what is wrong with them.

    Raises:
        UserError: there are checkpoints, and none is good. Nothing may start afresh over them.
    """
    root = Path(output) / "checkpoints"
    name = named_by_latest(root)
    fault = _fault_of_latest(root, name, damaged)
    if name and not fault:
        return Found(root / name)
    folders, named = step_folders(root), _STEP.fullmatch(name or "")
    faults = {folder: fault_of(folder, damaged) for folder in folders}
    good = [folder for folder in folders if not faults[folder]]
    if good:
        newest = max(good, key=lambda folder: (not named or step_of(folder) <= int(named[1]), step_of(folder)))
        return Found(newest, f"{root / 'latest'} {fault}: takes {newest.name}, the newest complete checkpoint")
    if folders or (root / "latest").exists():
        told = [f"{root / 'latest'} {fault}", *(f"{folder.name} {what}" for folder, what in faults.items())]
        raise UserError(
            f"checkpoint {output}: none there is complete ({'; '.join(told)}); put one back, or move "
            f"{root} away to start afresh"
        )
    return None


def step_folders(root: Path) -> list[Path]:
    """The checkpoints in a folder `checkpoints`, complete or not, in the order of their steps."""
    return sorted((path for path in root.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step_"))


def fault_of(folder: Path, damaged: Mapping[str, str]) -> str | None:
    """Why a checkpoint is passed over, as `has no .metadata`; None for a good one."""
    if folder.name in damaged:
        return f"is damaged ({damaged[folder.name]})"
    missing = what_is_missing(folder)
    return f"has {missing}" if missing else None


def what_is_missing(folder: Path) -> str | None:
    """What makes a checkpoint incomplete, as `no .metadata`; None for a complete one. No file but two is opened."""
    try:
        digest = _tree(folder)["manifest"]
    except UserError:
        return "no readable run.json" if (folder / "run.json").is_file() else "no run.json"
    listed = read_manifest(folder, digest)
    if listed is None:
        return f"a damaged {MANIFEST}" if (folder / MANIFEST).is_file() else f"no {MANIFEST}"
    try:
        there = set(os.listdir(folder))
    except FileNotFoundError:  # its run has just deleted it
        return "no run.json"
    return next((f"no {name}" for name in listed if name not in there), None)


def file_of_another_size(folder: Path) -> str | None:
    """The first file of a complete checkpoint that is not as long as it was, and how; None where all are."""
    listed = read_manifest(folder, _tree(folder)["manifest"]) or {}
    faults = ((name, fault_of_file(folder / name, sum_of, contents=False)) for name, sum_of in listed.items())
    return next((f"{name} {fault}" for name, fault in faults if fault), None)


def read_run_state(folder: Path) -> RunState:
    """run.json of a checkpoint; keys that this version does not know are left out.

    Raises:
        UserError: it is missing, damaged, or of a newer version.
    """
    tree = _tree(folder)
    if tree["version"] > VERSION:
        raise UserError(
            f"checkpoint {folder}: run.json was written by a newer megatron-lpr (format {tree['version']}, this one "
            f"reads up to {VERSION}); update megatron-lpr"
        )
    known = {field.name for field in dataclasses.fields(RunState)}
    return RunState(**{key: value for key, value in tree.items() if key in known})


def write_run_state(folder: Path, state: RunState) -> None:
    """Write run.json into a checkpoint."""
    durable.write_text(folder / "run.json", sealed(state.__dict__))


def _tree(folder: Path) -> dict[str, Any]:
    """run.json as it was written, its entries of the kinds that they must be."""
    try:
        text = (folder / "run.json").read_text(encoding="utf-8")
        tree = json.loads(text)
        if text != sealed(tree):
            raise ValueError("it is not what was written")
        version = tree.get("version")
        unfit = misfit(int, version, "version")
        if not unfit and version <= VERSION:
            unfit = misfit(RunJson, tree)
    except PermissionError:
        raise  # no damage: no older checkpoint is taken in its place
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise _damaged(folder) from None
    if unfit is not None:
        raise _damaged(folder, f" ({unfit or 'it'} is not what a run writes)")
    return typing.cast(dict[str, Any], tree)


def gone(folder: str | Path) -> UserError:
    """What is said of a checkpoint that was there a moment ago."""
    return UserError(
        f"checkpoint {folder}: was deleted or moved while it was read, as a run does with old ones (checkpoint.keep); "
        "start again with the newest one of the run, or a copy"
    )


def refuse_gone(folder: str | Path) -> None:
    """Raises UserError where the reason why a checkpoint cannot be read is that it is not there any more."""
    if not Path(folder).is_dir():
        raise gone(folder)


def _damaged(folder: Path, how: str = "") -> UserError:
    if not folder.is_dir():
        return gone(folder)
    what = f"damaged{how}" if (folder / "run.json").is_file() else "missing"
    return UserError(f"checkpoint {folder}: run.json is {what}; give another checkpoint of the run")


def named_by_latest(root: Path) -> str | None:
    """What `latest` says; None where it is missing."""
    latest = root / "latest"
    return latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None


def _fault_of_latest(root: Path, name: str | None, damaged: Mapping[str, str]) -> str | None:
    """What is wrong with the `name` that `latest` says; None when it is a complete checkpoint's."""
    if name is None:
        return "is missing"
    if not _STEP.fullmatch(name):
        return f"names no checkpoint ('{name[:40]}')"
    if not (root / name).is_dir():
        return f"names {name}, which is not there"
    if name in damaged:
        return f"names {name}, which is damaged ({damaged[name]})"
    missing = what_is_missing(root / name)
    return f"names {name}, which is not complete ({missing})" if missing else None
