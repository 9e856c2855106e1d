"""Output folders that are either complete or not there."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.files import durable
from megatron_lpr.files.output_place import INSIDE, check_vacant, resolved

# What belongs to a model besides weights and config; copied byte for byte, because transformers 5 saves a
# tokenizer in a form that 4.x and vLLM cannot read.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# The files that make a folder a model.
LAST = (".index.json", "config.json")


@contextmanager
def complete_folder(out_dir: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `out_dir` when the block ends well, and vanishes when it does not.

    It lies beside `out_dir` as `.NAME.incomplete` and is renamed at the end. Where that is impossible, and where
    `out_dir` is there already (a mount point, a link, a folder with an owner and permissions for a purpose), it lies
    inside, and its files are moved up at the end, config.json last, without which no folder is a model. A process that
    is killed leaves the temporary folder, the next one replaces it. A block that ended well is never deleted: when its
    folder cannot be put in place after all, it stays.

    UserError, before anything is done, when `out_dir` exists and is not empty, while another process writes it, and
    where neither way works; and when the disk is full.
    """
    check_vacant(out_dir)
    out = resolved(out_dir)
    absent = [path for path in (out, *out.parents) if not path.exists()]
    lock = None
    try:
        temporary = _temporary(out)
        lock = os.open(temporary, os.O_RDONLY)
        _lock(lock, fcntl.LOCK_EX, out_dir)
        check_vacant(out_dir)  # the other process may have just finished
        _empty(temporary)
        _lock(lock, fcntl.LOCK_SH, out_dir)
        try:
            if temporary.parent == out:
                _try_moving_up(temporary)
            yield temporary
            for path in temporary.iterdir():
                durable.sync(path)
            durable.sync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            _remove_empty(absent)
            raise
        _put_in_place(temporary, out, out_dir)
    except OSError as error:
        raise UserError(f"cannot write '{out_dir}': {error.strerror or error}") from error
    finally:
        if lock is not None:
            os.close(lock)


def _temporary(out: Path) -> Path:
    """Makes the folder to write into, or finds the one that a killed process left. OSError where there can be none."""
    beside = out.with_name(f".{out.name}.incomplete")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        if _folders_can_be_renamed(out.parent):
            beside.mkdir(exist_ok=True)
            return beside
    inside = out / INSIDE
    inside.mkdir(parents=True, exist_ok=True)
    return inside


def _folders_can_be_renamed(parent: Path) -> bool:
    """Not on every network file system: some rename files only. OSError where nothing can be written."""
    probe = Path(tempfile.mkdtemp(prefix=".probe_", dir=parent))
    renamed = probe.with_name(f"{probe.name}.renamed")
    try:
        (probe / "file").touch()
        probe.rename(renamed)
        return True
    except OSError:
        return False
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        shutil.rmtree(renamed, ignore_errors=True)


def _try_moving_up(folder: Path) -> None:
    """OSError where a file cannot be moved from a folder to its parent."""
    probe = folder / f".probe_{os.getpid()}"
    probe.touch()
    probe.rename(folder.parent / probe.name).unlink()


def _put_in_place(temporary: Path, out: Path, out_dir: str | Path) -> None:
    try:
        check_vacant(out_dir)
        if temporary.parent == out:
            _move_up(temporary)
        else:
            temporary.rename(out)
    except (OSError, UserError) as error:
        raise UserError(
            f"'{out_dir}' is written and complete but could not be put in place, and stays in '{temporary}': move what "
            f"is there to where you want it ({error})"
        ) from error


def _move_up(folder: Path) -> None:
    """Moves the files of a folder to its parent, those last without which no program takes it for a model."""
    files = sorted(folder.iterdir(), key=lambda path: (path.name.endswith(LAST), path.name == LAST[-1], path.name))
    moved = []
    try:
        for path in files:
            moved.append(folder.parent / path.name)
            path.rename(moved[-1])
        folder.rmdir()
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    durable.sync(folder.parent)


def _remove_empty(folders: list[Path]) -> None:
    """Those that were made for nothing, the innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            pass  # it was never made, or is not empty: another process uses it


def _lock(folder: int, kind: int, out_dir: str | Path) -> None:
    """Exclusive to take a folder over, shared to write into it; the system drops it when the process ends."""
    try:
        fcntl.flock(folder, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing '{out_dir}': wait for it, or choose another folder") from None
    except OSError:
        pass  # a file system without locks


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def companions_of(base_dir: str | Path) -> list[str]:
    """The tokenizer and generation files that a model has, and an export of it."""
    return [name for name in COMPANION_FILES if (Path(base_dir) / name).is_file()]


def copy_companions(base_dir: str | Path, out_dir: Path) -> None:
    """Copies them byte for byte."""
    for name in companions_of(base_dir):
        shutil.copyfile(Path(base_dir) / name, out_dir / name)
