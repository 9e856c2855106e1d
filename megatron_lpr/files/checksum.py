"""XXH3 checksums of files: taken while they are written, compared while they are read.

They find what a disk, a network or a copy has done to a file, at some GB/s on a core. What must stand up to somebody
who means it has a SHA-256 (digest.py).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_lpr.errors import UserError

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Checksum:
    """What a file must be: its size, and the 128 bits of XXH3 in hexadecimal."""

    size: int
    xxh3_128: str


class ChecksummedFile:
    """A new file whose bytes are summed up as they are written; it is on the disk when the `with` block is left.

    Attributes:
        error: why a write has failed, for libraries that write and make another error of it.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=1 << 20)
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self.error: OSError | None = None

    def __enter__(self) -> "ChecksummedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: Any) -> int:
        """Append bytes, or whatever lies in memory like them."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._hash.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def flush(self) -> None:
        """Nothing: what has been written is on the disk at the end."""

    def tell(self) -> int:
        """The bytes that have been written."""
        return self._size

    @property
    def checksum(self) -> Checksum:
        """Of what has been written so far."""
        return Checksum(size=self._size, xxh3_128=self._hash.hexdigest())


def file_checksum(path: Path) -> Checksum:
    """Of a file that is there. Raises OSError where it cannot be read."""
    digest, size, buffer = xxhash.xxh3_128(), 0, bytearray(_CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return Checksum(size=size, xxh3_128=digest.hexdigest())


def fault_of_file(path: Path, expected: Checksum, *, contents: bool = True) -> str | None:
    """What is wrong with a file, as `is missing`; None where it is what it must be.

    contents: read it, and not only ask for its size.

    Raises:
        UserError: there is no right to read it, which says nothing of its bytes.
    """
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"has {size:,} bytes in place of {expected.size:,}"
        if contents and file_checksum(path) != expected:
            return "is damaged: its bytes are not those that were written"
    except FileNotFoundError:
        return "is missing"
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; ask its owner for the right to read it") from None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None
