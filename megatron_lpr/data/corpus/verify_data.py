"""Reads all of every corpus of a manifest and compares it with what the manifest says."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_lpr._replay_sampler import LanguageRuns
from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import HELD_OUT, Corpus, Manifest
from megatron_lpr.errors import UserError
from megatron_lpr.files.digest import file_sha256
from megatron_lpr.files.file_array import FileArray
from megatron_lpr.recipe.reading import REST, load_recipe
from megatron_lpr.reporting.progress import byte_progress

_CHUNK_BYTES = 8 << 20
_DOCUMENTS = 1 << 16

Advance = Callable[[int], None]  # takes the bytes that were read


def find_manifest(path: str) -> str:
    """The manifest that `path` is, or that the recipe there reads or writes.

    Raises:
        UserError: no such file, or a recipe without data.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            is_manifest = any(line.startswith("corpora:") for line in file)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}; give a manifest or a recipe") from error
    if is_manifest:
        return path
    recipe = load_recipe(path, under=REST)
    if recipe.data is not None:
        return recipe.data.manifest
    if recipe.preprocess.output is not None:
        return str(Path(recipe.preprocess.output) / "manifest.yaml")
    raise UserError(f"{path} names no data: neither data.manifest nor preprocess.output; give a manifest or a recipe")


def verify_data(manifest: Manifest, *, workers: int, show: bool = False) -> Iterator[tuple[str, str | None]]:
    """Yields (file, what is wrong with it or None) for every file of every corpus, in order; `workers` read at once.

    Of a .bin file the SHA-256, the number of tokens, and each token against the vocabulary; of an .idx file every
    boundary and, where the manifest has it, the SHA-256; of a .lang file the SHA-256 and every run; of the held-out
    documents the SHA-256.
    """
    corpora = [
        (corpus, suffix, check)
        for corpus in manifest.corpora
        for suffix, check, is_there in (
            ("bin", _check_tokens, True),
            ("idx", _check_index, True),
            ("lang", _check_languages, corpus.languages),
            (HELD_OUT, _check_held_out, corpus.heldout),
        )
        if is_there
    ]
    paths = [f"{corpus.prefix}.{suffix}" for corpus, suffix, _ in corpora]
    lock = threading.Lock()
    with (
        byte_progress("verify-data", sum(map(_size, paths)), show=show) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        results = [pool.submit(_complaint, check, corpus, manifest, advance) for corpus, _, check in corpora]
        for path, result in zip(paths, results, strict=True):
            yield path, result.result()


def _size(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.path.getsize(path)
    return 0


def _complaint(check: Callable, corpus: Corpus, manifest: Manifest, advance: Advance) -> str | None:
    try:
        check(corpus, manifest, advance)
    except UserError as error:
        return str(error)
    return None


def _check_tokens(corpus: Corpus, manifest: Manifest, advance: Advance) -> None:
    path, vocab_size = f"{corpus.prefix}.bin", manifest.tokenizer.vocab_size
    total = hashlib.sha256()
    outside = None
    for first, data in _chunks(path, advance):
        total.update(data.data)
        if outside is None:
            outside = _outside(corpus, first, data, vocab_size)
    if total.hexdigest() != corpus.digest:
        raise _other_bytes(path, total.hexdigest(), corpus.digest)
    if outside is not None:
        raise UserError(f"{path} {outside}, the vocabulary has {vocab_size}: it was made with another tokenizer")
    files = IndexedCorpus(corpus.prefix)
    if (files.num_tokens, files.num_documents) != (corpus.tokens, corpus.documents):
        raise UserError(
            f"{path} has {files.num_tokens} tokens in {files.num_documents} documents, in {manifest.path} it has "
            f"{corpus.tokens} in {corpus.documents}"
        )


def _outside(corpus: Corpus, first: int, data: np.ndarray, vocab_size: int) -> str | None:
    """Which token is none of the vocabulary; None where the index, which tells their type, cannot be read."""
    try:
        dtype = IndexedCorpus(corpus.prefix).tokens.dtype
    except UserError:
        return None
    tokens = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    if not len(tokens) or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return None
    wrong = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    return f"holds token {int(tokens[wrong])} at place {first // dtype.itemsize + wrong}"


def _check_index(corpus: Corpus, manifest: Manifest, advance: Advance) -> None:
    path = f"{corpus.prefix}.idx"
    digest = file_sha256(path, advance)
    if digest != corpus.index_digest:
        raise _other_bytes(path, digest, corpus.index_digest)
    files = IndexedCorpus(corpus.prefix)
    for first in range(0, len(files), _DOCUMENTS):
        files.boundaries(first, min(_DOCUMENTS, len(files) - first))


def _check_languages(corpus: Corpus, manifest: Manifest, advance: Advance) -> None:
    assert corpus.languages is not None and corpus.language_digest is not None
    path = f"{corpus.prefix}.lang"
    digest = file_sha256(path, advance)
    if digest != corpus.language_digest:
        raise _other_bytes(path, digest, corpus.language_digest)
    LanguageRuns(corpus.prefix, num_tokens=corpus.tokens, num_languages=len(corpus.languages)).check()


def _check_held_out(corpus: Corpus, manifest: Manifest, advance: Advance) -> None:
    assert corpus.heldout is not None
    digest = file_sha256(corpus.held_out_file, advance)
    if digest != corpus.heldout.digest:
        raise _other_bytes(corpus.held_out_file, digest, corpus.heldout.digest)


def _chunks(path: str, advance: Advance) -> Iterator[tuple[int, np.ndarray]]:
    """(first byte, bytes) of a file, piece by piece."""
    content = FileArray(path, np.uint8)
    for first in range(0, len(content), _CHUNK_BYTES):
        data = content[first : first + _CHUNK_BYTES]
        yield first, data
        advance(len(data))


def _other_bytes(path: str, digest: str, recorded: str) -> UserError:
    return UserError(
        f"{path} holds other bytes than were written: its SHA-256 is {digest[:12]}..., recorded is {recorded[:12]}...; "
        "restore the file, or make the corpus again"
    )
