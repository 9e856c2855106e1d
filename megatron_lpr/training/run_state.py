"""Checkpoint folders and their run.json, readable without Megatron.

    <output>/checkpoints/step_00000024/   one checkpoint: Megatron's files and run.json
    <output>/checkpoints/latest           the name of the newest complete one
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lpr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint says of its run."""

    step: int
    consumed_samples: int
    has_optimizer: bool
    recipe: dict[str, Any]  # resolved
    data_state: dict[str, Any] | None = None  # of the replay sampler
    tokens_per_language: dict[str, int] | None = None  # since the start of the run


def checkpoint_folder(path: str) -> Path:
    """The checkpoint that `path` means: one itself, or the newest of a run's output folder.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    if (folder / "run.json").is_file():
        return folder
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        return folder / "checkpoints" / latest.read_text().strip()
    what = "no checkpoint there (no run.json, no checkpoints/latest)" if folder.exists() else "no such folder"
    raise UserError(f"checkpoint {path}: {what}; give the output folder of a run or one of its checkpoints")


def find_checkpoint(output: str) -> Path | None:
    """The newest complete checkpoint of a run's output folder, if any."""
    return checkpoint_folder(output) if (Path(output) / "checkpoints" / "latest").is_file() else None


def read_run_state(folder: Path) -> RunState:
    """run.json of a checkpoint."""
    return RunState(**json.loads((folder / "run.json").read_text(encoding="utf-8")))


def write_run_state(folder: Path, state: RunState) -> None:
    """Write run.json into a checkpoint."""
    (folder / "run.json").write_text(json.dumps(state.__dict__, indent=1, ensure_ascii=False), encoding="utf-8")
