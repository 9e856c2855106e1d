"""The folder of a corpus that is being made, `<prefix>.parts`: outlives a kill, goes when the corpus is there.

Many parts become few there, so that all of them can be open at once: 60,000 are combined 512 at a time to 118. Each
pass reads and writes the tokens once, and divides the number of parts by 512: up to 512 parts (8 GB of text) need none,
up to 262,144 (4 TB) one. So the merge's cost grows with the tokens, not with their square.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_lpr.data.preprocess import held_out
from megatron_lpr.data.preprocess.parts import (
    Part,
    PartRecord,
    PartWriter,
    columns_sha256,
    merge,
    part_path,
)
from megatron_lpr.data.text.documents import BadLine
from megatron_lpr.files import durable

_FAN_IN = 512


def work_folder(prefix: str) -> str:
    return f"{prefix}.parts"


@contextlib.contextmanager
def open_work_folder(prefix: str, identity: dict[str, Any], block_bytes: int) -> Iterator[tuple[str, int]]:
    """(folder, block_bytes) of the earlier run whose `identity` is the same, or a new folder.

    Parts of an earlier run are of use only if blocks are cut alike, so its block_bytes hold. The folder is left behind
    where the work fails, and removed where it holds no documents. Who opens it has the corpus' lock.
    """
    folder = work_folder(prefix)
    os.makedirs(folder, exist_ok=True)
    record = os.path.join(folder, "job.json")
    earlier = _read(record)
    if earlier is not None and earlier.get("identity") == identity:
        block_bytes = earlier["block_bytes"]
    else:
        if earlier is not None:
            print(f"{folder}: made from something else; its parts are removed", file=sys.stderr)
        _empty(folder)
        durable.write_text(Path(record), json.dumps({"identity": identity, "block_bytes": block_bytes}))
    try:
        yield folder, block_bytes
    finally:
        if not any(entry.name.endswith(".part") and entry.stat().st_size for entry in os.scandir(folder)):
            shutil.rmtree(folder)


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    known = isinstance(content, dict) and isinstance(content.get("block_bytes"), int) and content["block_bytes"] > 0
    return content if known else None


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))


def finished_part(path: str, *, combined: bool = False) -> PartRecord | None:
    """The record of a part whose file is still what was written; None where it has to be made (again).

    Args:
        path: without suffix.
        combined: its documents lie in a larger part, so that only its record is left.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        with open(f"{path}.json", encoding="utf-8") as file:
            fields = json.load(file)
        bad_lines = tuple(BadLine(*bad) for bad in fields["bad_lines"])
        record = PartRecord(**fields | {"bad_lines": bad_lines, "columns": tuple(fields["columns"])})
        if held_out.is_intact(path, record.held_out_sha256) and (combined or _is_intact(f"{path}.part", record)):
            return record
    return None


def _is_intact(path: str, record: PartRecord) -> bool:
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != sum(record.columns):
            return False
        hashes = [hashlib.sha256() for _ in record.columns]
        for digest, left in zip(hashes, record.columns, strict=True):
            while left:
                data = file.read(min(left, 1 << 20))
                digest.update(data)
                left -= len(data)
    return columns_sha256(hashes) == record.sha256


def fan_in() -> int:
    """Parts that may be open at once: 512, or half of what the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _FAN_IN if soft == resource.RLIM_INFINITY else max(2, min(_FAN_IN, soft // 2))


def combine_parts(
    parts: Sequence[Part], most: int, dtype: type, *, bucket_bytes: int, done: Callable[[int], None]
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
