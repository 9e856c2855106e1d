"""Texts of JSONL files, plain or gzipped, one object with a "text" string a line."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Literal

from megatron_lpr.errors import UserError

OnBadLine = Literal["refuse", "skip"]


class JsonlReader:
    """Iterates over the texts of `files` in order, counting bad lines.

    A bad line is invalid UTF-8, no JSON object, has no "text" string, or an empty one. Blank lines hold no
    document and are passed over.

    Attributes:
        bytes_read, bytes_total: position in the files as they lie on disk, for progress.
        skipped: bad lines left out so far.
        skipped_by_reason: their count and the "file:line" of the first, for each reason.

    Raises:
        UserError: a file is missing, unreadable or a broken gzip file; a bad line that is to be refused.
    """

    def __init__(self, files: Sequence[str], on_bad_line: OnBadLine):
        for path in files:
            if not os.path.isfile(path):
                raise UserError(f"no such text file: {path}")
        self.files = tuple(files)
        self.on_bad_line = on_bad_line
        self.bytes_read = 0
        self.bytes_total = sum(os.path.getsize(path) for path in files)
        self.skipped_by_reason: dict[str, tuple[int, str]] = {}

    @property
    def skipped(self) -> int:
        return sum(count for count, _ in self.skipped_by_reason.values())

    def __iter__(self) -> Iterator[str]:
        finished = 0
        for path in self.files:
            with open(path, "rb") as raw:
                for number, line in enumerate(_lines(raw, path), start=1):
                    self.bytes_read = finished + raw.tell()
                    if line.isspace():
                        continue
                    text, reason = _parse(line)
                    if reason is None:
                        yield text
                    else:
                        self._bad_line(f"{path}:{number}", reason)
            finished += os.path.getsize(path)

    def _bad_line(self, place: str, reason: str) -> None:
        if self.on_bad_line == "refuse":
            raise UserError(f"{place}: {reason}; correct it, or leave such lines out with on_bad_line: skip")
        count, first = self.skipped_by_reason.get(reason, (0, place))
        self.skipped_by_reason[reason] = (count + 1, first)


def files_sha256(files: Sequence[str]) -> str:
    """SHA-256 over the files' own SHA-256 sums, in order, hexadecimal."""
    total = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read the text file {path}: {error.strerror}") from error
    return total.hexdigest()


def _lines(raw: BinaryIO, path: str) -> Iterator[bytes]:
    if not path.endswith(".gz"):
        yield from iter(raw.readline, b"")
        return
    try:
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield from unpacked
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}") from error


def _parse(line: bytes) -> tuple[str, str | None]:
    """The text of a line, or the reason why it has none."""
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    except (ValueError, RecursionError):
        return "", "broken JSON"
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        return "", 'no "text" string'
    if not text.strip():
        return "", "empty text"
    # JSON can spell half of a surrogate pair, which is no character and which no tokenizer accepts.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "", "unpaired surrogate in the text"
    return text, None
