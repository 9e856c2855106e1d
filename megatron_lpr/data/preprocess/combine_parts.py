"""Many parts to few, so that all of them can be open at once: 60,000 parts are combined 512 at a time to 118.

Each pass reads and writes the tokens once, and divides the number of parts by 512: up to 512 parts (8 GB of text) need
none, up to 262,144 (4 TB) one. So the merge's cost grows with the tokens, not with their square.
"""

import contextlib
import os
import re
import resource
from collections.abc import Callable, Sequence

from megatron_lpr.data.preprocess.parts import Part, PartWriter, finished_part, part_path
from megatron_lpr.data.preprocess.shuffle import BUCKET_BYTES, merge

_FAN_IN = 512


def fan_in() -> int:
    """Parts that may be open at once: 512, or half of what the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _FAN_IN if soft == resource.RLIM_INFINITY else max(2, min(_FAN_IN, soft // 2))


def combine_parts(
    parts: Sequence[Part], most: int, dtype: type, *, bucket_bytes: int = BUCKET_BYTES, done: Callable[[int], None]
) -> list[Part]:
    """At most `most` parts, at least 2, with the documents of all `parts`, which are in the order of the text.

    A combined part takes the place of those it was made of, whose files are removed once it is on the disk; their
    records stay. A killed run loses the one it was writing.

    Args:
        done: called with the number of tokens of every few documents that were written.
    """
    parts = list(parts)
    while len(parts) > most:
        combined: list[Part] = []
        while len(parts) > 1 and (excess := len(combined) + len(parts) - most) > 0:
            few, parts = parts[: min(most, excess + 1)], parts[min(most, excess + 1) :]
            combined.append(_combine(few, dtype, bucket_bytes, done))
        parts = combined + parts
    return parts


def _combine(parts: Sequence[Part], dtype: type, bucket_bytes: int, done: Callable[[int], None]) -> Part:
    folder, first, last = parts[0].folder, parts[0].first, parts[-1].last
    with PartWriter(
        part_path(folder, first, last),
        documents=sum(part.record.documents for part in parts),
        tokens=sum(part.record.tokens for part in parts),
        dtype=dtype,
        mixed=len(parts[0].record.columns) > 3,
    ) as writer:
        for documents in merge(parts, dtype, bucket_bytes=bucket_bytes):
            writer.add_documents(documents)
            done(len(documents.tokens))
        record = writer.finish(durable=True)
    for part in parts:
        _remove(part)
    return Part(folder=folder, first=first, last=last, record=record)


def combined_parts(folder: str) -> list[Part]:
    """The combined parts that an earlier run left, in the order of the text; removes what they were made of."""
    found: list[Part] = []
    names = (re.fullmatch(r"(\d{8,})-(\d{8,})\.json", name) for name in os.listdir(folder))
    for first, last in sorted(((int(m[1]), int(m[2])) for m in names if m), key=lambda ends: (ends[0], -ends[1])):
        record = finished_part(part_path(folder, first, last))
        if record is None:  # damaged: the blocks have to be tokenised again
            os.remove(f"{part_path(folder, first, last)}.json")
            continue
        part = Part(folder=folder, first=first, last=last, record=record)
        if found and last <= found[-1].last:
            _remove(part)
        else:
            found.append(part)
    for part in found:
        for number in range(part.first, part.last + 1):
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{part_path(folder, number, number)}.part")
    return found


def _remove(part: Part) -> None:
    """Removes the documents of a part, and the record too where it tells of no block's bad lines."""
    if part.first != part.last:
        os.remove(f"{part.path}.json")
    os.remove(f"{part.path}.part")
