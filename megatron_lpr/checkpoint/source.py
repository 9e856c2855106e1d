"""The checkpoint that a run started from: what the run remembers of it, and where it is found again."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from megatron_lpr.checkpoint.run_state import RunState, gone, locate, read_run_state
from megatron_lpr.errors import UserError


def source_identity(folder: Path) -> dict[str, Any]:
    """What a run remembers of the checkpoint that it started from."""
    state = read_run_state(folder)
    try:
        written = (folder / "run.json").read_bytes()
    except FileNotFoundError:
        raise gone(folder) from None
    return {
        "folder": str(folder),
        "run": hashlib.sha256(written).hexdigest(),
        "tokens": sum((state.tokens_per_language or {}).values()) or None,
    }


def find_source(state: RunState, load: str | None = None) -> Path | None:
    """Where the source of a run's checkpoint is now, known by its digest; None: not where it was, nor at `load`."""
    if not state.source:
        return None
    for place in (load, state.source["folder"], state.recipe["model"]["load"]):
        with contextlib.suppress(UserError):
            if place and source_identity(folder := locate(str(place)).folder)["run"] == state.source["run"]:
                return folder
    return None


def chain(checkpoint: Path, load: str | None = None) -> tuple[Path, ...]:
    """The checkpoints that together hold what `checkpoint` means: itself, and what each leaves to the next.

    Args:
        load: where the source of the first may be now.

    Raises:
        UserError: one is not there.
    """
    state = read_run_state(checkpoint)
    if state.content != "over checkpoint":
        return (checkpoint,)
    source = find_source(state, load)
    if source is None:
        was = (state.source or {}).get("folder") or "a folder that it does not name"
        raise UserError(
            f"checkpoint {checkpoint}: holds routers only, and the checkpoint that its run started from is not there "
            f"any more (it was {was}, seen from {Path.cwd()}); put it back, say where it lies with model.load, or take "
            "the last checkpoint of a run, which needs no other"
        )
    return (checkpoint, *chain(source))
