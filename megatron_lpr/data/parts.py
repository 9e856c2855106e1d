"""Parts of a corpus that is being made: the tokenised documents of one block, sorted by their shuffle keys.

The key of a document is a hash of the seed, the corpus' text and the document's place in it; sorting a corpus by key
shuffles it. That order knows nothing of parts, workers or memory, so any of them may change.

A part is two files. `<number>.part`: keys u64 [D], lengths i32 [D], tokens [T], languages u16 [T] (mixed corpora only).
`<number>.json`: its counts, size and SHA-256, and the bad lines; written last, it says that the part is finished.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lpr.data.documents import BadLine

_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What is known of a finished part."""

    documents: int
    tokens: int
    bytes: int
    sha256: str
    bad_lines: tuple[BadLine, ...] = ()


class ShuffleKeys:
    """Keys of documents, uint64: a keyed BLAKE2b of their places, so uniform and independent whatever the places."""

    def __init__(self, seed: int, corpus_sha256: str):
        self._key = struct.pack("<Q", seed) + bytes.fromhex(corpus_sha256)

    def __call__(self, places: Iterable[tuple[int, int]]) -> np.ndarray:
        """Keys [D] of (file, offset) places."""
        digests = (
            hashlib.blake2b(struct.pack("<QQ", *place), key=self._key, digest_size=8).digest() for place in places
        )
        return np.frombuffer(b"".join(digests), np.uint64)


def write_part(
    path: str,
    keys: np.ndarray,
    documents: Sequence[np.ndarray],
    languages: Sequence[np.ndarray] | None,
    bad_lines: Sequence[BadLine] = (),
) -> PartRecord:
    """Writes `documents`, token arrays [n] of the corpus' dtype, in the order of their `keys` [D].

    Args:
        path: without suffix.
        languages: uint16 [n] of each document's tokens, or None where the corpus has one language.
    """
    order = np.argsort(keys, kind="stable")
    lengths = np.array([len(documents[index]) for index in order], np.int32)
    columns = [documents] if languages is None else [documents, languages]
    total = hashlib.sha256()
    size = 0
    with open(f"{path}.part.partial", "wb") as file:
        for data in (keys[order].data, lengths.data, *(column[index].data for column in columns for index in order)):
            file.write(data)
            total.update(data)
            size += data.nbytes
    record = PartRecord(
        documents=len(documents),
        tokens=int(lengths.sum(dtype=np.int64)),
        bytes=size,
        sha256=total.hexdigest(),
        bad_lines=tuple(bad_lines),
    )
    os.replace(f"{path}.part.partial", f"{path}.part")
    with open(f"{path}.json.partial", "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(record), file)
    os.replace(f"{path}.json.partial", f"{path}.json")
    return record


def finished_part(path: str) -> PartRecord | None:
    """The record of a part whose file is still what was written; None where it has to be made (again)."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        with open(f"{path}.json", encoding="utf-8") as file:
            fields = json.load(file)
        record = PartRecord(**fields | {"bad_lines": tuple(BadLine(*bad) for bad in fields["bad_lines"])})
        with open(f"{path}.part", "rb") as file:
            if os.fstat(file.fileno()).st_size == record.bytes:
                if hashlib.file_digest(file, "sha256").hexdigest() == record.sha256:
                    return record
    return None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Neighbouring documents of a part: keys uint64 [D], lengths int32 [D], tokens [T], languages uint16 [T]."""

    keys: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    languages: np.ndarray | None


class PartCursor:
    """Reads a part's documents once, in the order of their keys. Opens the file anew for each slice."""

    def __init__(self, path: str, record: PartRecord, dtype: type, *, has_languages: bool):
        self._path = f"{path}.part"
        self._record = record
        self._dtype = np.dtype(dtype)
        self._has_languages = has_languages
        self._document = 0
        self._token = 0

    def up_to(self, limit: int) -> Slice:
        """The next documents, whose keys are below `limit`."""
        documents, tokens = self._record.documents, self._record.tokens
        with open(self._path, "rb") as file:
            keys = self._keys_below(file, limit)
            lengths = _read(file, 8 * documents + 4 * self._document, np.int32, len(keys))
            count = int(lengths.sum(dtype=np.int64))
            first_token = 12 * documents
            ids = _read(file, first_token + self._dtype.itemsize * self._token, self._dtype, count)
            languages = None
            if self._has_languages:
                first_language = first_token + self._dtype.itemsize * tokens
                languages = _read(file, first_language + 2 * self._token, np.uint16, count)
        self._document += len(keys)
        self._token += count
        return Slice(keys=keys, lengths=lengths, tokens=ids, languages=languages)

    def _keys_below(self, file, limit: int) -> np.ndarray:
        found = []
        for first in range(self._document, self._record.documents, _CHUNK):
            keys = _read(file, 8 * first, np.uint64, min(_CHUNK, self._record.documents - first))
            end = len(keys) if limit >= 1 << 64 else int(np.searchsorted(keys, np.uint64(limit), side="left"))
            found.append(keys[:end])
            if end < len(keys):
                break
        return np.concatenate(found) if found else np.empty(0, np.uint64)


def _read(file, offset: int, dtype, count: int) -> np.ndarray:
    file.seek(offset)
    values = np.fromfile(file, dtype, count)
    assert len(values) == count, f"{file.name} lost its end"
    return values
