"""Files of JSON records, one a line, that several processes may have open and that outlive kills and full disks."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_lpr.errors import UserError

BLOCK_BYTES = 1 << 20  # that are read at once from the end of a file


def utc_now() -> str:
    """The time as ISO 8601, as 2026-11-25T18:40:12.345Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonLines:
    """Appends records, each with one write to the end of the file; a torn last line is closed, not continued.

    Raises:
        UserError: the file cannot be written, as on a full disk.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with writing(self.path):
            self._file = self.path.open("ab", buffering=0)
            torn = not ends_a_line(self.path)
        if torn:
            self._write(b"\n")

    def append(self, record: Mapping[str, Any], *, sync: bool = False) -> None:
        """Write one line; `sync` waits until it is on the disk."""
        self._write(to_json(record).encode() + b"\n")
        if sync:
            with writing(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, line: bytes) -> None:
        with writing(self.path):
            written = self._file.write(line)
        if written != len(line):
            raise UserError(f"{self.path}: the disk is full; make room and run again")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside it becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); mend that and run again") from error


def to_json(record: Mapping[str, Any]) -> str:
    """In one line; numbers that are not finite, which JSON does not have, become null."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


def from_json(line: bytes | str) -> dict[str, Any] | None:
    """The record of a line; None where there is none, as in one that a killed process has not finished."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def printable(text: str) -> str:
    """Halves of characters, which JSON may spell and nothing can print, become question marks."""
    return text.encode("utf-8", "replace").decode()


def without_controls(text: str) -> str:
    """What a terminal only shows: names that come with a run from elsewhere may hold what it would obey."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def complete_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file one by one; the last one only if it has its end."""
    with path.open("rb") as lines:
        yield from (line for line in lines if line.endswith(b"\n"))


def lines_from_the_end(path: Path) -> Iterator[bytes]:
    """The same, the last one first and without their ends: no more of the file is read than what is asked for."""
    parts: list[bytes] = []  # of the line whose beginning has not been reached, the last first
    is_complete = False
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(end - BLOCK_BYTES, 0)
            file.seek(begin)
            first, *lines = file.read(end - begin).split(b"\n")
            for line in reversed(lines):
                parts.append(line)
                if is_complete:
                    yield b"".join(reversed(parts))
                parts, is_complete = [], True
            parts.append(first)
            end = begin
    if is_complete:
        yield b"".join(reversed(parts))


def ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_finite(entry) for entry in value]
    return value
