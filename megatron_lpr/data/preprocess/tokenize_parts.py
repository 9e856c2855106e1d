"""Blocks of text to parts, on all cores: one process per core, each with a tokenizer of its own.

Processes, not the tokenizer libraries' threads: reading JSON, making arrays and writing parts run in parallel too,
and nothing but the text travels between processes. A single process is another one too, except for small blocks:
where it runs out of memory, this one can tell.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Container, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, wait

import numpy as np

from megatron_lpr.data.corpus.indexed import token_dtype
from megatron_lpr.data.preprocess import held_out
from megatron_lpr.data.preprocess.parts import PartRecord, ShuffleKeys, part_path, write_part
from megatron_lpr.data.preprocess.work_folder import finished_part
from megatron_lpr.data.text.documents import BadLine, Document, Reading, documents_of
from megatron_lpr.data.text.sentence_tagger import SentenceTagger, token_languages
from megatron_lpr.data.text.special_tokens import special_tokens
from megatron_lpr.data.text.text_files import Block
from megatron_lpr.data.text.tokenize import TokenIds, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.files.cores import usable_cores
from megatron_lpr.recipe.text_settings import PreprocessConfig, SourceConfig
from megatron_lpr.signals import not_for_children

# One call of the tokenizer: it takes up to 150 times the memory of the text.
_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 1 << 18
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PartJob:
    """What the parts of one corpus have in common; `sha256` is of its text and of the way that is read."""

    source: SourceConfig
    settings: PreprocessConfig
    sha256: str
    folder: str

    @property
    def stop_at_bad_line(self) -> bool:
        """Leave a part undone at its first bad line, as it will be refused anyway."""
        return self.settings.on_bad_line == "refuse"

    def path(self, number: int) -> str:
        """Path of a part, without suffix."""
        return part_path(self.folder, number, number)


def tokenize_parts(
    blocks: Iterator[Block], job: PartJob, workers: int, combined: Container[int] = ()
) -> Generator[tuple[Block, PartRecord, bool], None, None]:
    """Makes the part of every block, unless it is there already; yields in the order of the blocks.

    Holds at most `workers` + 1 blocks. The third value says that the part was kept.

    Args:
        combined: numbers of the blocks whose parts were combined to larger ones.

    Raises:
        UserError: from reading or tagging; no processes can be started, or one was killed.
    """
    numbered = enumerate(blocks)
    first = list(islice(numbered, 2))
    if len(first) < 2:
        workers = 1
    context = multiprocessing.get_context("spawn")
    alive, stop = context.Pipe(duplex=False)
    try:
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, workers, alive))
    except OSError as error:
        raise UserError(
            f"cannot start tokenisation processes: {error.strerror or error}; their semaphores want some KB of a "
            "/dev/shm that can be written to: make room there, or mount one"
        ) from error
    here: _Worker | None = None
    pending: deque[tuple[Block, PartRecord | Future[PartRecord], bool]] = deque()
    try:
        for number, block in chain(first, numbered):
            kept = finished_part(job.path(number), combined=number in combined)
            if kept is not None:
                pending.append((block, kept, True))
            elif workers == 1 and block.data is not None and len(block.data) <= _SMALL_BYTES:
                here = here or _Worker(job, threads=usable_cores())
                pending.append((block, here(number, block), False))
            else:
                with not_for_children():
                    pending.append((block, pool.submit(_work, number, block), False))
            if len(pending) > workers:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
        pool.shutdown()
    except BrokenProcessPool:
        raise UserError(
            "a tokenisation process was killed, perhaps for want of memory; run the same command again, with a smaller "
            "preprocess.workers or preprocess.max_document_bytes: finished parts are kept"
        ) from None
    finally:
        stop.close()  # whatever a process is still at, nobody waits for it
        pool.shutdown(cancel_futures=True)
        alive.close()


def _result(block: Block, made: "PartRecord | Future[PartRecord]", kept: bool) -> tuple[Block, PartRecord, bool]:
    return block, made if isinstance(made, PartRecord) else made.result(), kept


class _Worker:
    """Makes parts in one process."""

    def __init__(self, job: PartJob, threads: int):
        settings = job.settings
        assert settings.tokenizer is not None
        self._job = job
        self._reading = Reading.of(job.source, settings)
        self._tokenizer = load_tokenizer(
            settings.tokenizer, threads=threads, engine=settings.engine, special=special_tokens(settings)
        )
        self._opening = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._keys = ShuffleKeys(settings.seed, job.sha256)
        self._held_out_below = held_out.hash_limit(settings.heldout)
        self._number = {language: number for number, language in enumerate(self._reading.languages)}
        self._tagger = None if job.source.tagger is None else SentenceTagger(job.source)

    def __call__(self, number: int, block: Block) -> PartRecord:
        tokens: list[np.ndarray] = []
        languages: list[np.ndarray] = []
        places: list[tuple[int, int]] = []
        bad_lines: list[BadLine] = []
        kept_back: list[Document] = []
        for batch in self._batches(block, bad_lines, kept_back):
            for document, (ids, tags) in zip(batch, self._encode(batch), strict=True):
                bad = self._bad_line(block, document, ids, tags)
                if bad is not None:
                    bad_lines.append(bad)
                    continue
                tokens.append(self._document(ids))
                places.append((document.file, document.offset))
                if isinstance(tags, np.ndarray):
                    languages.append(self._document_languages(tags))
            if bad_lines and self._job.stop_at_bad_line:
                break
        # Documents of a batch are tagged and tokenised after the whole batch was read.
        bad_lines.sort(key=lambda bad: bad.line)
        if bad_lines and self._job.stop_at_bad_line:
            return PartRecord(documents=0, tokens=0, columns=(), sha256="", bad_lines=(bad_lines[0],))
        of_tokens = languages if self._reading.languages else None
        path = self._job.path(number)
        sha256 = held_out.write_part(path, kept_back)
        return write_part(path, self._keys(places), tokens, of_tokens, self._dtype, bad_lines, sha256)

    def _batches(self, block: Block, bad_lines: list[BadLine], kept_back: list[Document]) -> Iterator[list[Document]]:
        """The documents to tokenise; bad lines and documents that are held out go to the two lists."""
        batch: list[Document] = []
        size = 0
        for document in documents_of(block, self._reading):
            if isinstance(document, BadLine):
                bad_lines.append(document)
                if self._job.stop_at_bad_line:
                    break
                continue
            if self._held_out_below and held_out.hash_of(document.text) < self._held_out_below:
                kept_back.append(document)
                continue
            if batch and (len(batch) == _BATCH_DOCUMENTS or size + document.size > _BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(document)
            size += document.size
        if batch:
            yield batch

    def _encode(self, batch: list[Document]) -> Iterator[tuple[TokenIds, np.ndarray | str | None]]:
        """Token ids of each document and their languages [n]: None without languages, a string for a code unknown."""
        texts = [document.text for document in batch]
        if self._tagger is None:
            for document, ids in zip(batch, self._tokenizer.encode_batch(texts), strict=True):
                language = None
                if document.language is not None:
                    language = np.full(len(ids), self._number[document.language], np.uint16)
                yield ids, language
            return
        for document, (ids, ends) in zip(batch, self._tokenizer.encode_with_ends(texts), strict=True):
            starts, languages, unknown = self._tagger.sentences(document.text)
            yield ids, unknown if unknown is not None else token_languages(ends, starts, languages)

    def _document(self, ids: TokenIds) -> np.ndarray:
        """The tokens of a text between those that open a document, where there is one, and end it."""
        opening = len(self._opening)
        tokens: np.ndarray = np.empty(opening + len(ids) + 1, self._dtype)
        tokens[:opening] = self._opening
        tokens[opening:-1] = ids
        tokens[-1] = self._tokenizer.eod_id
        return tokens

    def _document_languages(self, tags: np.ndarray) -> np.ndarray:
        """The same of languages: those of the text's first and last tokens."""
        return np.concatenate([tags[: len(self._opening)], tags, tags[-1:]]).astype(np.uint16)

    def _bad_line(self, block: Block, document: Document, ids: TokenIds, tags: object) -> BadLine | None:
        if len(ids) == 0:
            return BadLine(block.path, document.line, "text without tokens")
        if isinstance(tags, str):
            return BadLine(block.path, document.line, "unknown language code", f" {tags} from the tagger")
        return None


_worker: _Worker | None = None


def _start_worker(job: PartJob, workers: int, alive: Connection) -> None:
    global _worker
    threading.Thread(target=_die_with, args=(alive,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    _worker = _Worker(job, threads=usable_cores() if workers == 1 else 1)


def _die_with(alive: Connection) -> None:
    wait([alive])  # its other end goes when the parent closes it, or dies
    os._exit(1)


def _work(number: int, block: Block) -> PartRecord:
    assert _worker is not None
    return _worker(number, block)
