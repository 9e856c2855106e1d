"""Whether an output folder can be written, asked before the work is done that it is for."""

import contextlib
import os
import shutil
from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.files.unexpanded import refuse_unexpanded

INSIDE = ".megatron_lpr_incomplete"  # what is not finished, in a folder that is filled in place


def check_vacant(out_dir: str | Path) -> None:
    """UserError when `out_dir` is there and is anything but a folder with nothing, or what a killed process left."""
    out = Path(out_dir)
    try:
        if not os.path.lexists(out):
            return
        if out.exists() and not out.is_dir():
            raise UserError(f"output folder '{out_dir}' is a file: choose another name")
        # the root of an ext4 disk always has its lost+found
        names = {path.name for path in out.iterdir()} - {"lost+found"} if out.exists() else set()
    except OSError as error:
        raise UserError(f"output folder '{out_dir}' cannot be read: {error.strerror}") from error
    if INSIDE in names and names != {INSIDE}:
        raise UserError(
            f"output folder '{out_dir}' holds part of an export that was killed while its files were put in place "
            f"(the rest is in '{out / INSIDE}'): remove what is in the folder and export again"
        )
    if names - {INSIDE}:
        raise UserError(f"output folder '{out_dir}' exists and is not empty: choose another or empty it")


def check_place(out_dir: str | Path, *sources: str | Path, needed: int = 0) -> None:
    """Whether a folder can be written, before the work is done that it is for; writes nothing.

    sources: folders that are read for it. needed: bytes that will be written. UserError when `out_dir` is or lies in a
    source, when it, or the folder that is to hold it, is a file or cannot be written, and when there is no space.
    """
    out = resolved(out_dir)
    refuse_unexpanded(out_dir)
    for source in sources:
        if out.is_relative_to(resolved(source)):
            raise UserError(f"output folder '{out_dir}' is or lies in '{source}', which is read: choose one outside")
    place = _existing(out)
    if not place.is_dir():
        raise UserError(f"output folder '{out_dir}' cannot be made: '{place}' is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"output folder '{out_dir}' cannot be made: no right to write in '{place}', or it is read-only")
    free = free_bytes(place)
    if needed > free:
        raise UserError(
            f"output folder '{out_dir}': '{place}' has {free / 1e9:.1f} GB free, the checkpoint needs "
            f"{needed / 1e9:.1f} GB: make room, or choose another folder"
        )


def check_file(out: str | Path, example: str = "result.json") -> None:
    """UserError where a file cannot be written to `out`; `example` is what one is called."""
    out = Path(out)
    refuse_unexpanded(out)
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, as {out / example}")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: cannot be written in {there}; name another place")


def check_page(out: str | Path, example: str) -> None:
    """As `check_file`; UserError too where the name is none of a page, which may be a text or a result."""
    if Path(out).suffix != ".html" and not Path(out).is_dir():
        raise UserError(f"--out {out}: is no name of a page; let it end in .html")
    check_file(out, example)


def free_bytes(folder: str | Path) -> int:
    """What can still be written into a folder, there or not."""
    return shutil.disk_usage(_existing(resolved(folder))).free


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def resolved(path: str | Path) -> Path:
    """The folder that a path means, through links, there or not. UserError where it can mean none."""
    try:
        folder = Path(path).resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()  # `exists` and `resolve` hide, from some version of Python on, what is wrong with a path
    except (OSError, RuntimeError) as error:  # too long a name; a link to itself
        raise UserError(f"'{path}' is no path of a folder: {getattr(error, 'strerror', None) or error}") from error
    return folder
