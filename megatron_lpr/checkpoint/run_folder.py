"""The output folder of a run while it runs: locked, tidied, and with one line of checkpoints.

Checkpoints are published, dropped and set aside by renaming, so that a process that is killed between any two renames
leaves whole checkpoints; what it leaves beside them has a name that starts with a dot and goes at the next start.
"""

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from megatron_lpr.checkpoint.run_state import (
    NONE_DAMAGED,
    fault_of,
    find_checkpoint,
    step_folders,
    step_of,
    what_is_missing,
)
from megatron_lpr.errors import UserError
from megatron_lpr.files import durable
from megatron_lpr.files.locks import run_lock
from megatron_lpr.platform import Ranks, together

WRITING = ".writing_"  # before the name of a checkpoint that is being written
SHARES = ".shares"  # in the folder of a checkpoint, until it is the run's latest
_LEAVINGS = (f"{WRITING}*", f"step_*/{SHARES}", ".dropping_*", ".latest*")


@contextlib.contextmanager
def run_folder(output: str, resume: Path | None, damaged: Mapping[str, str] = NONE_DAMAGED) -> Iterator[None]:
    """The folder is this run's inside it: rank 0 holds it for all ranks, and puts it in order first.

    Args:
        resume: the checkpoint that the run was planned to go on from; None: there was none.
        damaged: those that were passed over for it, by name, and what is wrong with them.

    Raises:
        UserError: another run holds the folder, or has changed it since the run was planned.
    """
    with contextlib.ExitStack() as held:
        is_first = Ranks.from_environment().rank == 0
        together(lambda: _take(held, output, resume, damaged) if is_first else None)
        yield


def _take(held: contextlib.ExitStack, output: str, resume: Path | None, damaged: Mapping[str, str]) -> None:
    held.enter_context(run_lock(output))
    found = find_checkpoint(output, damaged)
    if (found and found.folder) != resume:
        raise UserError(
            f"output: {output} was written to after this run was planned; start it again (in Python: plan it again)"
        )
    root = Path(output) / "checkpoints"
    if leavings := clear_leavings(root):
        print(f"deleted {', '.join(leavings)} in {root}, which a killed run has left", flush=True)
    if resume:
        for sentence in (set_damaged_aside(root, step_of(resume), damaged), set_future_aside(root, step_of(resume))):
            if sentence:
                print(sentence, flush=True)
        if found and found.note:
            durable.write_text(root / "latest", resume.name)


def publish(writing: Path, folder: Path) -> None:
    """Give a checkpoint whose files are on the disk its name, and let `latest` name it."""
    durable.sync(writing)
    if folder.exists():
        set_aside(folder.parent, [folder])
    writing.rename(folder)
    durable.write_text(folder.parent / "latest", folder.name)


def drop_old(newest: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Rename what the run has written before the `keep` newest checkpoints up to `newest`; 0 keeps all.

    Returns the folders, for whoever has time to delete them: they are no checkpoints any more, and the next start would
    delete them. Incomplete ones, and steps beyond `newest`, are not the run's own work and stay; so do multiples of
    `keep_every`.
    """
    assert keep >= 0, keep
    dropped = []
    line = [f for f in step_folders(newest.parent) if step_of(f) <= step_of(newest) and not what_is_missing(f)]
    for folder in line[:-keep] if keep else []:
        if keep_every and step_of(folder) % keep_every == 0:
            continue
        dropping = folder.with_name(f".dropping_{folder.name}")
        folder.rename(dropping)  # half of it deleted, it must not look like a checkpoint
        dropped.append(dropping)
    return dropped


def set_aside(root: Path, folders: Iterable[Path], where: Literal["abandoned", "damaged"] = "abandoned") -> Path:
    """Move checkpoints to a new folder under `where`; returns it."""
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 0
    while (place := root / where / (f"{stamp}-{number}" if number else stamp)).exists():
        number += 1
    place.mkdir(parents=True)
    for folder in folders:
        folder.rename(place / folder.name)
    durable.sync(place)
    durable.sync(root)
    return place


def set_future_aside(root: Path, step: int) -> str | None:
    """Set aside what lies beyond the step that a run resumes at, complete or not; returns the sentence that says so.

    After a rollback (`latest` names an older step) it is another line of the run, never to be mixed with the new one.
    """
    beyond = [folder for folder in step_folders(root) if step_of(folder) > step]
    if not beyond:
        return None
    place, names = set_aside(root, beyond), ", ".join(folder.name for folder in beyond)
    return f"set aside {names}, beyond the step that the run resumes at, to {place}; delete what you do not need"


def set_damaged_aside(root: Path, step: int, damaged: Mapping[str, str]) -> str | None:
    """Set aside what lies beyond the step that a run resumes at and is no good; returns the sentence that says so."""
    beyond = [folder for folder in step_folders(root) if step_of(folder) > step]
    faults = {folder: fault for folder in beyond if (fault := fault_of(folder, damaged))}
    if not faults:
        return None
    place = set_aside(root, faults, "damaged")
    told = "; ".join(f"{folder.name} {fault}" for folder, fault in faults.items())
    return f"set aside {', '.join(f.name for f in faults)} to {place} ({told}); delete what you do not need"


def clear_leavings(root: Path) -> list[str]:
    """Delete what killed saves have left; returns the names."""
    leavings = sorted(path for pattern in _LEAVINGS for path in root.glob(pattern))
    for path in leavings:
        # a link to a checkpoint on another disk goes, and what it leads to stays
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return [path.name for path in leavings]
