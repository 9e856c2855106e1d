"""Whether the files of corpora still hold what was written: some blocks of each, at every start of a training run.

When a corpus is written, its manifest entry records the SHA-256 of 256 blocks of 4 KiB of each of its files: one in
each 256th of the file, at a place that the corpus' digest chooses, and the first and the last. That costs the same
milliseconds for a file of any size. Other bytes throughout, or damage of more than 1/128 of a file, are seen for
certain; a flipped byte in a larger file most probably not: `megatron-lpr verify-data` reads everything.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from megatron_lpr.data.corpus.manifest import Corpus, Manifest
from megatron_lpr.errors import UserError
from megatron_lpr.files.digest import file_sha256
from megatron_lpr.files.file_array import FileArray

BLOCK_BYTES = 4096
_BLOCKS = 256
_READERS = 16


def spot_digests(prefix: str, key: str, *, languages: bool) -> dict[str, str]:
    """`spot_digest` of each file of a corpus, by suffix; `languages`: it has a .lang.

    Raises:
        UserError: a file cannot be read.
    """
    return {suffix: spot_digest(f"{prefix}.{suffix}", key) for suffix in ("bin", "idx", *["lang"] * languages)}


def spot_digest(path: str, key: str) -> str:
    """SHA-256 of the blocks of a file that `key` chooses; of all of it where it has no more than 256.

    Raises:
        UserError: the file cannot be read.
    """
    content, digest = FileArray(path, np.uint8), hashlib.sha256()
    for block in _places(-(-len(content) // BLOCK_BYTES), key):
        digest.update(content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
    return digest.hexdigest()


def _places(blocks: int, key: str) -> Iterable[int]:
    if blocks <= _BLOCKS:
        return range(blocks)
    words = np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * _BLOCKS), "<u8").tolist()
    bounds = [number * blocks // _BLOCKS for number in range(_BLOCKS + 1)]
    places = {low + (word * (high - low) >> 64) for word, low, high in zip(words, bounds, bounds[1:], strict=False)}
    return sorted(places | {0, blocks - 1})


def check_spots(corpus: Corpus) -> None:
    """Compares the blocks of a corpus' files with what its entry records.

    Raises:
        UserError: a file holds other bytes than were written, or cannot be read; the message names it.
    """
    for suffix, recorded in corpus.spot_digests.items():
        path = f"{corpus.prefix}.{suffix}"
        if spot_digest(path, corpus.digest) != recorded:
            raise _altered(path, corpus)


def check_held_out(corpus: Corpus) -> None:
    """Compares a corpus' held-out documents, where it has any, with their SHA-256.

    Raises:
        UserError: as `check_spots`.
    """
    if corpus.heldout is not None and file_sha256(corpus.held_out_file) != corpus.heldout.digest:
        raise _altered(corpus.held_out_file, corpus)


def _altered(path: str, corpus: Corpus) -> UserError:
    return UserError(
        f"{path} does not hold what was written when corpus '{corpus.name}' was made: its bytes have changed "
        "since; restore the file, or make the corpus again with 'megatron-lpr preprocess'"
    )


def check_at_start(manifest: Manifest, local_rank: int) -> None:
    """`check_spots` of every corpus, by the first process of each node: the files may be the node's own.

    Raises:
        UserError: as `check_spots`.
    """
    if local_rank == 0:
        # a network file system answers each block late, but many at once
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(check_spots, manifest.corpora):
                pass
