"""Locks of output folders, among the processes of one node or of many.

`run_lock` gives a folder to one training run. `FolderLocks` lets several processes preprocess into a folder at once,
each its own corpora. Both are fcntl's locks: they reach other nodes over NFS and parallel file systems, children of a
process do not inherit them, and they go when their process ends, however it ends. On a file system without locks a
warning stands in for them.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_lpr.errors import UserError, warn

LOCK_FILE = "run.lock"
_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: kind, whence, start, length, process
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def run_lock(output: str) -> Iterator[None]:
    """Hold the output folder of a run, which is made where it is missing and goes again where it stays empty.

    The lock file says who holds it, for people and for the message; what a killed run leaves in it locks nothing.

    Raises:
        UserError: another run holds it (says which), or the folder cannot be written.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK_FILE, output)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error.strerror}); choose another folder") from None
    with file:
        json.dump(_self(), file)
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def holder_of(output: str) -> dict[str, Any] | None:
    """What the process that holds the output folder of a run says of itself; None where none does.

    The lock is asked for and not taken, so that a run that starts meanwhile gets it. Not for the process that holds it,
    which would lose it: the kernel drops it with any descriptor of the file that the process closes. On a file system
    without locks the file stands for it, which a killed run leaves.
    """
    try:
        with (Path(output) / LOCK_FILE).open(encoding="utf-8", errors="replace") as file:
            if _is_free(file):
                return None
            try:
                said = json.load(file)
            except ValueError:
                return {}
            return said if isinstance(said, dict) else {}
    except OSError:
        return None


def _is_free(file: TextIO) -> bool:
    wanted = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0)
    try:
        kind, *_ = struct.unpack_from(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, wanted))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return bool(kind == fcntl.F_UNLCK)


class FolderLocks:
    """Locks of one process in `folder`; leaving the `with` block releases them all.

    Each lock is a byte of the empty file `.lock`: the first is the manifest's, one chosen by its name each corpus'. The
    file stays: who locks a file that was removed does not meet who locks its successor.

    Raises:
        UserError: the folder cannot be written to; from `take`, another process has the corpus.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._works = True
        try:
            self._file = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"cannot write to the output folder {folder}: {error.strerror}") from error

    def __enter__(self) -> "FolderLocks":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    @contextlib.contextmanager
    def manifest(self) -> Iterator[None]:
        """Nobody else reads and rewrites the manifest meanwhile; waits for its turn."""
        self._lock(fcntl.LOCK_EX, 0)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN, 0)

    def take(self, corpus: str) -> None:
        """Nobody else makes this corpus until `release`."""
        try:
            self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, _byte_of(corpus))
        except BlockingIOError:
            prefix = os.path.join(self._folder, corpus)
            raise UserError(f"another process is making {prefix}; wait for it, or end it") from None

    def release(self, corpus: str) -> None:
        self._lock(fcntl.LOCK_UN, _byte_of(corpus))

    def _lock(self, operation: int, byte: int) -> None:
        if self._works:
            instead = "let one process at a time preprocess into it, or entries of the manifest may be lost"
            self._works = _lock(self._file, operation, byte, self._folder, instead)


def _lock(file: int, operation: int, byte: int, folder: str, instead: str) -> bool:
    """Locks or unlocks one byte of a file; False where the file system has no locks: it warns, and says what to do.

    Raises:
        BlockingIOError: another process has it.
        UserError: it cannot be locked for some other reason.
    """
    try:
        fcntl.lockf(file, operation, 1, byte)
    except OSError as error:
        if error.errno in _HELD:
            raise BlockingIOError from None
        if error.errno not in _NO_LOCKS:
            raise UserError(f"{folder} cannot be locked ({error.strerror}); choose another folder") from error
        warn(f"{folder} is on a file system without locks ({error.strerror}); {instead}")
        return False
    return True


def _byte_of(corpus: str) -> int:
    digest = hashlib.sha256(corpus.encode()).digest()
    return 1 + int.from_bytes(digest[:7], "little")


def _locked(path: Path, output: str) -> TextIO:
    """The lock file of a run, empty and open, with its lock where there are locks."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            instead = "make sure that no other run writes there"
            has_lock = _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, 0, output, instead)
        except BlockingIOError:
            with file:
                raise UserError(
                    f"output: {output} is in use by another run ({_holder(file)}); wait for it or stop it, or choose "
                    "another folder"
                ) from None
        if not has_lock or _is_still(path, file):
            file.truncate(0)
            return file
        file.close()  # its holder has removed it in the meantime


def _is_still(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _self() -> dict[str, str | int]:
    job = {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), **job, "since": since}


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in json.load(file).items())
    except (ValueError, AttributeError):
        return "it has not said which"
