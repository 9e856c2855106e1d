"""Parts to documents in the order of their keys: a merge by key range, in bounded memory.

Keys are uniform, so a range of 1/B of all keys holds about 1/B of the corpus. Each range is gathered from all parts,
sorted in memory and handed on. Every part stays open and is read once from its start to its end.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_lpr.data.preprocess.parts import Documents, Part, PartCursor

BUCKET_BYTES = 64 << 20


def merge(parts: Sequence[Part], dtype: type, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Documents]:
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
    values, first = np.empty(sum(count for _, count in sources), dtype), 0
    for cursor, count in sources:
        cursor.read(column, values[first : first + count])
        first += count
    return np.concatenate([values[start:end] for start, end in spans])
