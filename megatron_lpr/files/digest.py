"""The SHA-256 of a file."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from megatron_lpr.errors import UserError

_CHUNK_BYTES = 8 << 20


def file_sha256(path: str | Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, hexadecimal.

    Args:
        advance: takes the number of bytes that were read, a few at a time; for progress.

    Raises:
        UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(_CHUNK_BYTES):
                digest.update(data)
                if advance is not None:
                    advance(len(data))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
