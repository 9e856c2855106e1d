"""Output folders that are either complete or not there."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lpr.errors import UserError

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
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def check_vacant(out_dir: str | Path) -> None:
    """UserError when `out_dir` exists and is anything but an empty folder."""
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output folder '{out_dir}' exists and is not empty: choose another or remove it")


@contextmanager
def complete_folder(out_dir: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `out_dir` when the block ends well, and vanishes when it does not.

    It lies beside `out_dir` as `.NAME.incomplete`. A process that is killed leaves it, the next one replaces it.
    UserError, before anything is done, when `out_dir` exists and is not empty, or while another process writes it;
    and when the disk is full or the folder cannot be written.
    """
    check_vacant(out_dir)
    out = Path(out_dir).absolute()
    temporary = out.with_name(f".{out.name}.incomplete")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot create '{temporary}': {error.strerror}") from error
    try:
        _lock(lock, fcntl.LOCK_EX, out_dir)
        check_vacant(out_dir)  # the other process may have just finished
        _empty(temporary)
        _lock(lock, fcntl.LOCK_SH, out_dir)
        try:
            yield temporary
            os.fsync(lock)
            temporary.rename(out)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(f"cannot write '{out_dir}': {error.strerror or error}") from error
            raise
    finally:
        os.close(lock)


@contextmanager
def hold_folder(temporary: Path, parent: int) -> Iterator[None]:
    """For a process that writes into the temporary folder of its parent: nobody replaces it before this one is done.

    UserError when the parent, a process id, has died: the folder may be another's by now.
    """
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _lock(lock, fcntl.LOCK_SH, temporary)
        if os.getppid() != parent:
            raise UserError(f"the process that was writing '{temporary}' has died")
        yield
    finally:
        os.close(lock)


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


def copy_companions(base_dir: str | Path, out_dir: Path) -> list[str]:
    """Copies tokenizer and generation files byte for byte; returns the names of those that were there."""
    names = [name for name in COMPANION_FILES if (Path(base_dir) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(base_dir) / name, out_dir / name)
    return names
