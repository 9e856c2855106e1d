"""Parts to a shuffled corpus: a merge by key range, in bounded memory.

Keys are uniform, so a range of 1/B of all keys holds about 1/B of the corpus. Each range is gathered from all parts,
sorted in memory and appended.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_lpr.data.indexed import IndexedWriter
from megatron_lpr.data.language_runs import LanguageRunsWriter
from megatron_lpr.data.parts import PartCursor, Slice

BUCKET_BYTES = 64 << 20


def merge(
    parts: Sequence[PartCursor],
    writer: IndexedWriter,
    runs: LanguageRunsWriter | None,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    total_bytes: int,
) -> Iterator[float]:
    """Appends the documents of all `parts` to `writer` (and their languages to `runs`) in the order of their keys.

    Yields the share that is done. Holds about three times `bucket_bytes`, or the longest document
    where that is more.

    Args:
        total_bytes: of the parts' tokens and languages; it decides how many ranges there are.
    """
    buckets = max(1, -(-total_bytes // bucket_bytes))
    for bucket in range(1, buckets + 1):
        limit = (bucket << 64) // buckets
        slices = [found for found in (part.up_to(limit) for part in parts) if len(found.keys)]
        if slices:
            _append(slices, writer, runs)
        yield bucket / buckets


def _append(slices: Sequence[Slice], writer: IndexedWriter, runs: LanguageRunsWriter | None) -> None:
    lengths = np.concatenate([part.lengths for part in slices])
    # Equal keys keep the order of the parts, which is that of the text.
    order = np.argsort(np.concatenate([part.keys for part in slices]), kind="stable")
    ends = np.cumsum(lengths, dtype=np.int64)
    spans = np.stack([ends - lengths, ends], axis=1)[order].tolist()
    writer.add_documents(_gather([part.tokens for part in slices], spans), lengths[order])
    if runs is not None:
        runs.add(_gather([part.languages for part in slices], spans))


def _gather(columns: Sequence[np.ndarray], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """The concatenation of `columns`, its spans in the order given."""
    values = np.concatenate(columns)
    return np.concatenate([values[start:end] for start, end in spans])
