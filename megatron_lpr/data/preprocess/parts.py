"""Parts of a corpus that is being made, documents sorted by their shuffle keys, and their merge into that order.

The key of a document is a hash of the seed, the corpus' text and the document's place in it; sorting a corpus by key
shuffles it. That order knows nothing of parts, workers or memory, so any of them may change.

A part is two files. `<number>.part`, column after column: keys u64 [D], lengths i32 [D], tokens [T], languages u16 [T]
(mixed corpora only). `<number>.json`: its counts, sizes and SHA-256, and the bad lines; written last, it says that the
part is finished. A part holds the documents of one block of text, or of several: `<first>-<last>` (work_folder.py).

The merge goes by key range, in bounded memory. Keys are uniform, so a range of 1/B of all keys holds about 1/B of the
corpus: it is gathered from all parts, sorted in memory and handed on. Each part is read once, from start to end.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_lpr.data.text.documents import BadLine

BUCKET_BYTES = 64 << 20
_KEYS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What is known of a finished part: counts, bytes of each column, SHA-256 of the columns' SHA-256 sums.

    `held_out_sha256` is of the file of its block's held-out documents, None where there are none.
    """

    documents: int
    tokens: int
    columns: tuple[int, ...]
    sha256: str
    bad_lines: tuple[BadLine, ...] = ()
    held_out_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A finished part of the blocks `first` to `last`."""

    folder: str
    first: int
    last: int
    record: PartRecord

    @property
    def path(self) -> str:
        """Without suffix."""
        return part_path(self.folder, self.first, self.last)


def part_path(folder: str, first: int, last: int) -> str:
    return os.path.join(folder, f"{first:08}" if first == last else f"{first:08}-{last:08}")


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents in the order of their keys: keys uint64 [D], lengths int32 [D], tokens [T], languages uint16 [T]."""

    keys: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    languages: np.ndarray | None


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


class PartWriter:
    """Writes a part of known size, its documents a few at a time in the order of their keys.

    Args:
        path: without suffix.
        documents, tokens: how many there will be.
        dtype: of the tokens.
        mixed: whether each token has a language.
    """

    def __init__(self, path: str, *, documents: int, tokens: int, dtype: type, mixed: bool):
        self._path = path
        self._counts = documents, tokens
        widths = [8 * documents, 4 * documents, np.dtype(dtype).itemsize * tokens] + [2 * tokens] * mixed
        self._columns = tuple(widths)
        self._ends = list(accumulate(widths))
        self._places = [end - width for end, width in zip(self._ends, widths, strict=True)]
        self._hashes = [hashlib.sha256() for _ in widths]
        self._file = open(f"{path}.part.partial", "wb", buffering=0)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, column: int, data: np.ndarray) -> None:
        """Appends to a column: 0 keys, 1 lengths, 2 tokens, 3 languages."""
        view = np.ascontiguousarray(data).data.cast("B") if len(data) else memoryview(b"")
        self._hashes[column].update(view)
        while len(view):
            written = os.pwrite(self._file.fileno(), view, self._places[column])
            self._places[column] += written
            view = view[written:]

    def add_documents(self, documents: Documents) -> None:
        for column, data in enumerate((documents.keys, documents.lengths, documents.tokens, documents.languages)):
            if data is not None:
                self.add(column, data)

    def finish(
        self, bad_lines: Sequence[BadLine] = (), held_out_sha256: str | None = None, *, durable: bool = False
    ) -> PartRecord:
        """Gives the files their names; `durable`: not before the data has reached the disk."""
        assert self._places == self._ends, "a part of another size than was said"
        if durable:
            os.fsync(self._file.fileno())
        os.replace(f"{self._path}.part.partial", f"{self._path}.part")
        documents, tokens = self._counts
        record = PartRecord(
            documents=documents,
            tokens=tokens,
            columns=self._columns,
            sha256=columns_sha256(self._hashes),
            bad_lines=tuple(bad_lines),
            held_out_sha256=held_out_sha256,
        )
        with open(f"{self._path}.json.partial", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(record), file)
        os.replace(f"{self._path}.json.partial", f"{self._path}.json")
        return record


def write_part(
    path: str,
    keys: np.ndarray,
    documents: Sequence[np.ndarray],
    languages: Sequence[np.ndarray] | None,
    dtype: type,
    bad_lines: Sequence[BadLine] = (),
    held_out_sha256: str | None = None,
) -> PartRecord:
    """Writes `documents`, token arrays [n] of `dtype`, in the order of their `keys` [D].

    Args:
        path: without suffix.
        languages: uint16 [n] of each document's tokens, or None where the corpus has one language.
    """
    order = np.argsort(keys, kind="stable")
    lengths = np.array([len(documents[index]) for index in order], np.int32)
    total = int(lengths.sum(dtype=np.int64))
    mixed = languages is not None
    with PartWriter(path, documents=len(documents), tokens=total, dtype=dtype, mixed=mixed) as writer:
        writer.add(0, keys[order])
        writer.add(1, lengths)
        for column, values in ((2, documents), (3, languages)):
            if values:
                writer.add(column, np.concatenate([values[index] for index in order]))
        return writer.finish(bad_lines, held_out_sha256)


def columns_sha256(hashes: Iterable[Any]) -> str:
    """SHA-256 of the SHA-256 sums of a part's columns, hexadecimal."""
    return hashlib.sha256(b"".join(column.digest() for column in hashes)).hexdigest()


class PartCursor:
    """Reads a part once, in the order of its keys; its file stays open until `close`."""

    def __init__(self, part: Part, dtype: type):
        columns = part.record.columns
        self._left = part.record.documents
        self._places = [end - width for end, width in zip(accumulate(columns), columns, strict=True)]
        self._dtype = np.dtype(dtype)
        self._keys, self._lengths = np.empty(0, np.uint64), np.empty(0, np.int32)
        self._file = os.open(f"{part.path}.part", os.O_RDONLY)

    def close(self) -> None:
        os.close(self._file)

    @property
    def first_key(self) -> float:
        """Of the next document, rounded; infinite where there is none."""
        return float(self._keys[0]) if len(self._keys) or self._fill() else float("inf")

    def below(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys uint64 [D] and lengths int32 [D] of the next documents, whose keys are below `limit`."""
        keys, lengths = [], []
        while len(self._keys) or self._fill():
            end = len(self._keys) if limit >= 1 << 64 else int(np.searchsorted(self._keys, np.uint64(limit)))
            keys.append(self._keys[:end])
            lengths.append(self._lengths[:end])
            self._keys, self._lengths = self._keys[end:], self._lengths[end:]
            if len(self._keys):
                break
        if len(keys) == 1:
            return keys[0], lengths[0]
        return np.concatenate(keys or [self._keys]), np.concatenate(lengths or [self._lengths])

    def read(self, column: int, values: np.ndarray) -> None:
        """Fills `values` with what follows in a column: 2 tokens, 3 languages."""
        view = values.data.cast("B")
        while len(view):
            count = os.preadv(self._file, [view], self._places[column])
            assert count > 0, "a part lost its end"
            self._places[column] += count
            view = view[count:]

    def _fill(self) -> bool:
        count = min(self._left, _KEYS_AT_ONCE)
        if count:
            self._left -= count
            self._keys, self._lengths = np.empty(count, np.uint64), np.empty(count, np.int32)
            self.read(0, self._keys)
            self.read(1, self._lengths)
        return count > 0


def merge(parts: Sequence[Part], dtype: type, *, bucket_bytes: int) -> Iterator[Documents]:
    """Yields the documents of all `parts`, some at a time, in the order of their keys.

    Holds about three times `bucket_bytes`, or the longest document where that is more, and 24 KB for each part.

    Args:
        parts: no more than may be open at once, in the order of the text.
        dtype: of the tokens.
    """
    total_bytes = sum(sum(part.record.columns[2:]) for part in parts)
    buckets = max(1, -(-total_bytes // bucket_bytes))
    with contextlib.ExitStack() as stack:
        cursors = []
        for part in parts:
            cursors.append(PartCursor(part, dtype))
            stack.callback(cursors[-1].close)
        mixed = len(parts[0].record.columns) > 3
        # A range of few documents meets few of many parts; the others are not even asked.
        first_keys = np.array([cursor.first_key for cursor in cursors], np.float64)
        for bucket in range(1, buckets + 1):
            limit = (bucket << 64) // buckets
            some = np.flatnonzero(first_keys <= limit)
            documents = _next([cursors[number] for number in some], limit, dtype, mixed)
            if documents is not None:
                yield documents
            first_keys[some] = [cursors[number].first_key for number in some]


def _next(cursors: Sequence[PartCursor], limit: int, dtype: type, mixed: bool) -> Documents | None:
    found = [(cursor, *cursor.below(limit)) for cursor in cursors]
    found = [one for one in found if len(one[1])]
    if not found:
        return None
    lengths = np.concatenate([lengths for _, _, lengths in found])
    keys = np.concatenate([keys for _, keys, _ in found])
    # Equal keys keep the order of the parts, which is that of the text.
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(lengths, dtype=np.int64)
    spans = np.stack([ends - lengths, ends], axis=1)[order].tolist()
    sources = [(cursor, int(lengths.sum(dtype=np.int64))) for cursor, _, lengths in found]
    return Documents(
        keys=keys[order],
        lengths=lengths[order],
        tokens=_gather(sources, 2, dtype, spans),
        languages=_gather(sources, 3, np.uint16, spans) if mixed else None,
    )


def _gather(
    sources: Sequence[tuple[PartCursor, int]], column: int, dtype: type, spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """The next values of a column, so many of each source, their spans in the order given."""
    values: np.ndarray = np.empty(sum(count for _, count in sources), dtype)
    first = 0
    for cursor, count in sources:
        cursor.read(column, values[first : first + count])
        first += count
    return np.concatenate([values[start:end] for start, end in spans])
