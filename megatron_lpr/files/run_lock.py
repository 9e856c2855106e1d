"""One run at a time in an output folder: a lock that the kernel holds for a process, and gives up when it dies."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_lpr.errors import UserError

LOCK_FILE = "run.lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def run_lock(output: str) -> Iterator[None]:
    """Hold the output folder, which is made where it is missing and goes again where it stays empty.

    A POSIX lock: network file systems know it, and children of the process do not inherit it. The file says who holds
    it, for people and for the message; what a killed run leaves in it locks nothing.

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


def _locked(path: Path, output: str) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            file.close()
            if error.errno in _HELD:
                raise UserError(
                    f"output: {output} is in use by another run ({holder}); wait for it or stop it, or choose another "
                    "folder"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"warning: {output} is on a file system without locks ({error.strerror}): make sure that no other run "
                "writes there",
                file=sys.stderr,
                flush=True,
            )
            return open(os.devnull, "w", encoding="utf-8")
        if _is_still(path, file):
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
