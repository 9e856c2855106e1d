"""Locks of an output folder that several processes write to at once, on one node or on many.

Each lock is a byte of the empty file `.lock`: the first is the manifest's, one chosen by its name each corpus'. They
are fcntl's locks, which reach other nodes over NFS and parallel file systems, and which go when their process ends,
however it ends. The file stays: who locks a file that was removed does not meet who locks its successor.
"""

import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator

from megatron_lpr.errors import UserError


class FolderLocks:
    """Locks of one process in `folder`; leaving the `with` block releases them all.

    On a file system without locks it warns, once, and does without.

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

    def __exit__(self, *error) -> None:
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
        except (BlockingIOError, PermissionError):
            prefix = os.path.join(self._folder, corpus)
            raise UserError(f"another process is making {prefix}; wait for it, or end it") from None

    def release(self, corpus: str) -> None:
        self._lock(fcntl.LOCK_UN, _byte_of(corpus))

    def _lock(self, operation: int, byte: int) -> None:
        if not self._works:
            return
        try:
            fcntl.lockf(self._file, operation, 1, byte)
        except (BlockingIOError, PermissionError):
            raise
        except OSError as error:
            self._works = False
            print(
                f"warning: {self._folder} is on a file system without locks ({error.strerror}); let one process at a "
                "time preprocess into it, or entries of the manifest may be lost",
                file=sys.stderr,
            )


def _byte_of(corpus: str) -> int:
    digest = hashlib.sha256(corpus.encode()).digest()
    return 1 + int.from_bytes(digest[:7], "little")
