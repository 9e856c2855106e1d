"""Documents that are held out of a corpus to evaluate on: which they are, and the file that they are written to.

A document is held out where a keyed hash of its text is below the share asked for of all hashes. That knows nothing of
files, corpora, seeds or workers: documents with the same text are all held out or all trained on, in whatever corpora
they are, and those that a smaller share holds out a larger one does too.

    blocks --one process per core--> <part>.heldout (JSON lines) --by hash--> <name>.heldout.jsonl.gz

The file is in the order of the hashes, so that its beginning (evaluation.max_bytes) is a fair sample of the corpus.
"""

import gzip
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_lpr.data.corpus.manifest import HELD_OUT, HeldOut
from megatron_lpr.data.text.documents import Document
from megatron_lpr.files.digest import file_sha256

_KEY = b"megatron_lpr heldout"
_SUFFIX = ".heldout"


def hash_of(text: str) -> int:
    """Of a document: a keyed BLAKE2b, 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), key=_KEY, digest_size=8).digest(), "big")


def hash_limit(share: float) -> int:
    """Documents whose hash is below it are held out."""
    return int(share * 2**64)


def write_part(path: str, documents: Iterable[Document]) -> str | None:
    """Writes the held-out documents of a block beside its part; the SHA-256 of the file, None where there are none.

    Args:
        path: of the part, without suffix.
    """
    lines = [_line(document) for document in documents]
    if not lines:
        return None
    with open(f"{path}{_SUFFIX}.partial", "wb") as file:
        file.writelines(lines)
    os.replace(f"{path}{_SUFFIX}.partial", f"{path}{_SUFFIX}")
    return hashlib.sha256(b"".join(lines)).hexdigest()


def is_intact(path: str, sha256: str | None) -> bool:
    """Whether a part's held-out documents (None: it has none) are still what was written.

    Raises:
        OSError: they are gone.
    """
    if sha256 is None:
        return True
    return hashlib.sha256(Path(path + _SUFFIX).read_bytes()).hexdigest() == sha256


def collect(folder: str, prefix: str, share: float) -> HeldOut:
    """Writes the held-out documents of all parts in a work folder to the corpus' file; returns its record.

    Equal hashes keep the order of the text. Holds 16 bytes for each document.
    """
    parts = sorted(Path(folder).glob(f"*{_SUFFIX}"), key=lambda path: int(path.stem))
    hashes, starts, size = array("Q"), array("Q"), 0
    with tempfile.TemporaryFile(dir=folder) as lines:
        for path in parts:
            with path.open("rb") as part:
                for line in part:
                    text = json.loads(line)["text"]
                    hashes.append(hash_of(text))
                    starts.append(lines.tell())
                    size += len(text.encode("utf-8"))
                    lines.write(line)
        target = f"{prefix}.{HELD_OUT}"
        with open(f"{target}.partial", "wb") as file:
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                for index in np.argsort(np.array(hashes, np.uint64), kind="stable"):
                    lines.seek(starts[index])
                    packed.write(lines.readline())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, target)
    return HeldOut(share=share, documents=len(hashes), bytes=size, digest=file_sha256(target))


def _line(document: Document) -> bytes:
    fields = {"text": document.text} | ({} if document.language is None else {"language": document.language})
    return json.dumps(fields, ensure_ascii=False).encode("utf-8") + b"\n"
