"""Small files that are whole after a crash or a power cut: written beside, synced, renamed, the folder synced too."""

import errno
import os
import secrets
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file: a reader sees the old content or the new one, and the new one is on the disk on return.

    A link stays one, and what is no file, as /dev/null, is written to.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))
    # of this call alone: two that write one file at once replace it in turn; in two containers both may be process 1
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # on a full disk it would take room
        error.filename = error.filename or str(path)  # which `write` does not tell
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)
