"""One corpus from its text files: blocks, parts, merge."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np
import tokenizers

from megatron_lpr.config import SourceConfig
from megatron_lpr.data.documents import BadLines, OnBadLine, Reading
from megatron_lpr.data.indexed import IndexedWriter
from megatron_lpr.data.language_runs import LanguageRunsWriter
from megatron_lpr.data.manifest import Corpus, Source
from megatron_lpr.data.parts import PartCursor, PartRecord
from megatron_lpr.data.progress import Progress
from megatron_lpr.data.shuffle import BUCKET_BYTES, merge
from megatron_lpr.data.source_checks import tagger_settings
from megatron_lpr.data.spot_check import with_checksums
from megatron_lpr.data.text_files import BLOCK_BYTES, read_blocks
from megatron_lpr.data.tokenize import Engine, Tokenizer
from megatron_lpr.data.tokenize_parts import PartJob, tokenize_parts
from megatron_lpr.data.work_folder import open_work_folder
from megatron_lpr.errors import UserError

_LEAST_BLOCK_BYTES = 4 << 20


def make_corpus(
    source: SourceConfig,
    *,
    prefix: str,
    tokenizer: Tokenizer,
    tokenizer_dir: str,
    sha256: str,
    seed: int,
    on_bad_line: OnBadLine,
    workers: int,
    engine: Engine,
) -> Corpus:
    """Writes `prefix`.bin, .idx and, where the corpus mixes languages, .lang; returns the manifest's entry.

    Args:
        source: its files are paths, without patterns.
        sha256: of the text and of the way it is read.

    Raises:
        UserError: a bad line that is to be refused, no usable document, an unreadable file, a full disk.
    """
    size = sum(os.path.getsize(path) for path in source.files)
    identity = {
        "corpus_sha256": sha256,
        "seed": seed,
        "tokenizer_sha256": tokenizer.sha256,
        "eod_id": tokenizer.eod_id,
        "tokenizers": tokenizers.__version__,
        "engine": engine,
    }
    # Enough blocks to keep every process busy to the end, none so small that starting a process costs more.
    block_bytes = min(max(size // (4 * workers), _LEAST_BLOCK_BYTES), BLOCK_BYTES)
    bad_lines = BadLines(on_bad_line)
    try:
        with open_work_folder(prefix, identity, block_bytes) as (folder, block_bytes):
            job = _job(source, tokenizer_dir, engine, sha256, seed, folder, on_bad_line)
            records = _tokenize(source, job, prefix, block_bytes, workers, bad_lines, size)
            if not any(record.documents for record in records):
                raise UserError(f"corpus '{source.name}' is empty: no usable document in {', '.join(source.files)}")
            writer, language_digest = _merge(source, job, prefix, records, tokenizer.vocab_size)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or prefix}: {error.strerror or error}") from error
    entry = Corpus(
        name=source.name,
        prefix=prefix,
        language=source.language,
        role=source.role,
        weight=float(source.weight),
        documents=writer.documents,
        tokens=writer.tokens,
        digest=writer.digest,
        source=Source(sha256=sha256, seed=seed, skipped_lines=bad_lines.count),
        languages=dict(source.languages) or None,
        language_digest=language_digest,
    )
    return with_checksums(entry)


def _job(
    source: SourceConfig,
    tokenizer_dir: str,
    engine: Engine,
    sha256: str,
    seed: int,
    folder: str,
    on_bad_line: OnBadLine,
) -> PartJob:
    reading = Reading(
        format=source.format,
        text_field=source.text_field,
        language_field=source.language_field,
        languages=tuple(source.languages),
        sample_by=source.sample_by,
    )
    return PartJob(
        tokenizer=tokenizer_dir,
        engine=engine,
        reading=reading,
        tagger=tagger_settings(source),
        seed=seed,
        corpus_sha256=sha256,
        folder=folder,
        stop_at_bad_line=on_bad_line == "refuse",
    )


def _tokenize(
    source: SourceConfig,
    job: PartJob,
    prefix: str,
    block_bytes: int,
    workers: int,
    bad_lines: BadLines,
    size: int,
) -> list[PartRecord]:
    """The records of all parts, in order."""
    blocks = read_blocks(source.files, format=source.format, sample_by=source.sample_by, block_bytes=block_bytes)
    progress = Progress(source.name)
    records: list[PartRecord] = []
    documents = tokens = kept = 0
    with _bad_line_report(f"{prefix}.bad_lines.txt") as report:
        for block, record, was_there in tokenize_parts(blocks, job, workers):
            for bad in record.bad_lines:
                bad_lines.add(bad)
                report.write(f"{bad}\n")
            records.append(record)
            documents += record.documents
            tokens += record.tokens
            share = block.position / max(size, 1)
            if was_there:
                kept += 1
                progress.keep(share, tokens)
            progress.update(share, documents, tokens)
    if documents:
        progress.close()
    if kept:
        print(f"{source.name}: {kept:,} of {len(records):,} parts were there from an earlier run", file=sys.stderr)
    for reason, (count, first) in bad_lines.by_reason.items():
        where = f"the first at {first.path}:{first.line}; all are listed in {prefix}.bad_lines.txt"
        print(f"{source.name}: left out {count:,} lines ({reason}), {where}", file=sys.stderr)
    return records


@contextlib.contextmanager
def _bad_line_report(path: str) -> Iterator[TextIO]:
    """A file for the bad lines; an empty one is removed, and so is that of a run that failed."""
    try:
        with open(f"{path}.partial", "w", encoding="utf-8", errors="backslashreplace") as report:
            yield report
            empty = report.tell() == 0
        if empty:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        else:
            os.replace(f"{path}.partial", path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.partial")


def _merge(
    source: SourceConfig, job: PartJob, prefix: str, records: Sequence[PartRecord], vocab_size: int
) -> tuple[IndexedWriter, str | None]:
    """Writes the corpus' files; returns their closed writer and the digest of the .lang file."""
    mixed = bool(source.languages)
    runs = LanguageRunsWriter(prefix) if mixed else None
    try:
        with IndexedWriter(prefix, vocab_size) as writer:
            parts = [
                PartCursor(job.path(number), record, writer.dtype, has_languages=mixed)
                for number, record in enumerate(records)
            ]
            token_bytes = np.dtype(writer.dtype).itemsize + (2 if mixed else 0)
            total_bytes = token_bytes * sum(record.tokens for record in records)
            progress = Progress(f"{source.name} shuffled")
            for share in merge(parts, writer, runs, bucket_bytes=BUCKET_BYTES, total_bytes=total_bytes):
                progress.update(share, writer.documents, writer.tokens)
            progress.close()
            # Neither an old index nor old languages may ever stand beside new tokens.
            for suffix in (".idx", ".lang"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(prefix + suffix)
            if runs is not None:
                runs.close()
    except BaseException:
        if runs is not None:
            runs.discard()
        raise
    return writer, runs.digest if runs is not None else None
