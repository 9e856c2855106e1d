"""Whether the files of a checkpoint hold what was written, by the checksums of its manifest.

The ranks of a meeting share the files of a checkpoint among them; each reads its own with a few threads, as XXH3 and
the disk work without Python.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_lpr.checkpoint.manifest import MANIFEST, read_manifest
from megatron_lpr.checkpoint.run_state import read_run_state, refuse_gone, step_folders, what_is_missing
from megatron_lpr.checkpoint.source import chain
from megatron_lpr.errors import UserError
from megatron_lpr.files.checksum import Checksum, fault_of_file
from megatron_lpr.files.cores import usable_cores
from megatron_lpr.platform import collected

_THREADS = 8


def verify_files(folder: Path, *, contents: bool = True) -> str:
    """Compare the files of a complete checkpoint with its manifest; all ranks of the meeting call it.

    Args:
        contents: read the files, and not only ask for their sizes.

    Returns:
        What is wrong, the same on all ranks, as `__0_0.distcp is missing`; nothing where all is well.
    """
    found = collected(lambda rank, ranks: _faults(folder, contents, rank, ranks))
    more = f", and {len(found) - 1} more" if found[1:] else ""
    return f"{found[0]}{more}" if found else ""


def _faults(folder: Path, contents: bool = True, rank: int = 0, ranks: int = 1) -> list[str]:
    """Of this rank's share of the files."""
    listed = _listed_files(folder)
    own = sorted(listed, key=lambda name: (-listed[name].size, name))[rank::ranks]

    def look(name: str) -> str | None:
        fault = fault_of_file(folder / name, listed[name], contents=contents)
        return f"{name} {fault}" if fault else None

    with ThreadPoolExecutor(min(_THREADS, usable_cores())) as threads:
        return [fault for fault in threads.map(look, own) if fault]


def refuse_damaged(checkpoint: Path, *, contents: bool, load: str | None = None) -> None:
    """Raises UserError where a checkpoint, which is read for something else than to go on, is damaged.

    Or one that it leaves weights to. load: where the nearest of those may be now.
    """
    if missing := what_is_missing(checkpoint):
        refuse_gone(checkpoint)
        raise UserError(f"checkpoint {checkpoint}: not complete ({missing}); give another checkpoint of the run")
    for folder in chain(checkpoint, load):
        if fault := verify_files(folder, contents=contents):
            refuse_gone(folder)
            raise UserError(f"checkpoint {folder}: {fault}; copy it again, or give another checkpoint of the run")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one, damaged ones too, or the output folder of a run, and no export."""
    if (path / "config.json").is_file():
        return False
    own = any((path / name).is_file() for name in ("run.json", MANIFEST, ".metadata"))
    return own or (path / "checkpoints").is_dir() or path in step_folders(path.parent)


def faults_of_all(path: Path, told: Callable[[str], object]) -> int:
    """Compare every file of a checkpoint, or of all of a run, with its checksum; returns how many are damaged.

    told: gets a line for each damaged file, and one for each checkpoint.
    """
    number = 0
    for folder in step_folders(path / "checkpoints") or [path]:
        lines, faults = [], list[str]()
        try:
            missing = what_is_missing(folder)
            faults = [f"it has {missing}"] if missing else _faults(folder)
            lines = faults or [_good(folder)]
        except UserError:
            if folder == path or folder.is_dir():
                raise
        if folder != path and not folder.is_dir():
            lines, faults = ["not there any more; its run deletes old ones (checkpoint.keep)"], []
        for line in lines:
            told(f"{folder.name}: {line}")
        number += len(faults)
    return number


def _good(folder: Path) -> str:
    listed = _listed_files(folder)
    return f"{len(listed) + 2} files, {sum(file.size for file in listed.values()):,} bytes: as they were written"


def _listed_files(folder: Path) -> dict[str, Checksum]:
    """The files of a complete checkpoint's manifest."""
    digest = read_run_state(folder).manifest
    assert digest is not None
    listed = read_manifest(folder, digest)
    if listed is None:
        refuse_gone(folder)
    assert listed is not None, f"{folder} is not complete"
    return listed
