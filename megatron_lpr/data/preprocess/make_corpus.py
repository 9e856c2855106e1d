"""One corpus from its text files: read in blocks, tokenised to parts, merged in the order of their keys."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import tokenizers

from megatron_lpr.data.corpus.indexed import IndexedWriter, LanguageRunsWriter, token_dtype
from megatron_lpr.data.corpus.manifest import HELD_OUT, Corpus, HeldOut, TextSource
from megatron_lpr.data.corpus.spot_check import spot_digests
from megatron_lpr.data.preprocess import held_out
from megatron_lpr.data.preprocess.parts import BUCKET_BYTES, Part, merge
from megatron_lpr.data.preprocess.tokenize_parts import PartJob, tokenize_parts
from megatron_lpr.data.preprocess.work_folder import combine_parts, combined_parts, fan_in, open_work_folder
from megatron_lpr.data.text.documents import BadLines
from megatron_lpr.data.text.text_files import BLOCK_BYTES, read_blocks
from megatron_lpr.data.text.tokenize import Tokenizer
from megatron_lpr.errors import UserError, warn
from megatron_lpr.files.cores import usable_cores
from megatron_lpr.files.digest import file_sha256
from megatron_lpr.recipe.text_settings import PreprocessConfig, SourceConfig
from megatron_lpr.reporting.progress import DocumentProgress

_LEAST_BLOCK_BYTES = 4 << 20


def make_corpus(source: SourceConfig, settings: PreprocessConfig, tokenizer: Tokenizer, sha256: str) -> Corpus:
    """Writes the corpus' .bin, .idx, where it mixes languages .lang, and held-out documents; returns its entry.

    Args:
        source: its files are paths, without patterns.
        sha256: of the text and of the way it is read.

    Raises:
        UserError: a bad line that is to be refused, no usable document, an unreadable file, a full disk.
    """
    assert settings.output is not None
    prefix = os.path.join(settings.output, source.name)
    settings = dataclasses.replace(settings, corpora=())  # which may be thousands, and go to every process
    bad_lines = BadLines(settings.on_bad_line)
    identity, block_bytes = _identity(settings, tokenizer, sha256), _block_bytes(source, settings)
    try:
        with open_work_folder(prefix, identity, block_bytes) as (folder, block_bytes):
            job = PartJob(source=source, settings=settings, sha256=sha256, folder=folder)
            parts = _tokenize(job, prefix, block_bytes, bad_lines)
            if not any(part.record.documents for part in parts):
                raise _nothing_to_train_on(source, settings, parts)
            writer, language_digest = _merge(
                source, prefix, parts, tokenizer.vocab_size, holds_out=settings.heldout > 0
            )
            out = _held_out(folder, prefix, settings.heldout, writer.documents)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or prefix}: {error.strerror or error}") from error
    assert writer.digest is not None
    return Corpus(
        name=source.name,
        prefix=prefix,
        language=source.language,
        role=source.role,
        weight=float(source.weight),
        documents=writer.documents,
        tokens=writer.tokens,
        digest=writer.digest,
        index_digest=file_sha256(f"{prefix}.idx"),
        spot_digests=spot_digests(prefix, writer.digest, languages=language_digest is not None),
        source=TextSource(sha256=sha256, seed=settings.seed, skipped_lines=bad_lines.count),
        languages=dict(source.languages) or None,
        language_digest=language_digest,
        heldout=out,
    )


def _nothing_to_train_on(source: SourceConfig, settings: PreprocessConfig, parts: Sequence[Part]) -> UserError:
    if any(part.record.held_out_sha256 for part in parts):
        return UserError(
            f"preprocess.heldout: {settings.heldout}; holds out every document of corpus '{source.name}'; lower it"
        )
    return UserError(f"corpus '{source.name}' is empty: no usable document in {', '.join(source.files)}")


def _held_out(folder: str, prefix: str, share: float, trained_on: int) -> HeldOut | None:
    if not share:
        return None
    out = held_out.collect(folder, prefix, share)
    if not out.documents:
        warn(
            f"preprocess.heldout: {share}; holds out none of the {trained_on:,} documents of {prefix}, so that "
            f"{prefix}.{HELD_OUT} is empty; raise it"
        )
    return out


def _identity(settings: PreprocessConfig, tokenizer: Tokenizer, sha256: str) -> dict[str, Any]:
    """What a killed run must have had in common with this one for its parts to be of use."""
    return {
        "corpus_sha256": sha256,
        "seed": settings.seed,
        "tokenizer_sha256": tokenizer.sha256,
        "eod_id": tokenizer.eod_id,
        "bos_id": tokenizer.bos_id,
        "parse_special_tokens": settings.parse_special_tokens,
        "tokenizers": tokenizers.__version__,
        "engine": settings.engine,
        "max_document_bytes": settings.max_document_bytes,
    }


def _block_bytes(source: SourceConfig, settings: PreprocessConfig) -> int:
    """Enough blocks to keep every process busy to the end, none so small that starting a process costs more."""
    return min(max(_size(source) // (4 * _workers(settings)), _LEAST_BLOCK_BYTES), BLOCK_BYTES)


def _size(source: SourceConfig) -> int:
    return sum(os.path.getsize(path) for path in source.files)


def _workers(settings: PreprocessConfig) -> int:
    return settings.workers or usable_cores()


def _tokenize(job: PartJob, prefix: str, block_bytes: int, bad_lines: BadLines) -> list[Part]:
    """All parts, in the order of the text."""
    source, size = job.source, _size(job.source)
    blocks = read_blocks(source.files, format=source.format, sample_by=source.sample_by, block_bytes=block_bytes)
    progress = DocumentProgress(source.name)
    parts = combined_parts(job.folder)
    combined = {number for part in parts for number in range(part.first, part.last + 1)}
    # closed here: no worker may still write where a refused line makes an end of the folder
    made = contextlib.closing(tokenize_parts(blocks, job, _workers(job.settings), combined))
    documents = tokens = kept = blocks_done = 0
    with made as finished, _bad_line_report(f"{prefix}.bad_lines.txt") as report:
        for number, (block, record, was_there) in enumerate(finished):
            for bad in record.bad_lines:
                bad_lines.add(bad)
                report.write(f"{bad}\n")
            if number not in combined:
                record = dataclasses.replace(record, bad_lines=())  # of a large corpus they may be many
                parts.append(Part(folder=job.folder, first=number, last=number, record=record))
            blocks_done += 1
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
        print(f"{source.name}: {kept:,} of {blocks_done:,} parts were there from an earlier run", file=sys.stderr)
    for reason, (count, first) in bad_lines.by_reason.items():
        where = f"the first at {first.path}:{first.line}; all are listed in {prefix}.bad_lines.txt"
        print(f"{source.name}: left out {count:,} lines ({reason}), {where}", file=sys.stderr)
    return sorted(parts, key=lambda part: part.first)


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
    source: SourceConfig, prefix: str, parts: Sequence[Part], vocab_size: int, *, holds_out: bool
) -> tuple[IndexedWriter, str | None]:
    """Writes the corpus' files; returns their closed writer and the digest of the .lang file."""
    parts = _few_parts(source.name, parts, token_dtype(vocab_size))
    runs = LanguageRunsWriter(prefix) if source.languages else None
    try:
        with IndexedWriter(prefix, vocab_size) as writer:
            total = sum(part.record.tokens for part in parts)
            progress = DocumentProgress(f"{source.name} shuffled")
            for documents in merge(parts, writer.dtype, bucket_bytes=BUCKET_BYTES):
                writer.add_documents(documents.tokens, documents.lengths)
                if runs is not None:
                    assert documents.languages is not None
                    runs.add(documents.languages)
                progress.update(writer.tokens / total, writer.documents, writer.tokens)
            progress.close()
            # Neither an old index nor old languages, nor what was held out before, may ever stand beside new tokens.
            for suffix in (".idx", ".lang", *([f".{HELD_OUT}"] if holds_out else [])):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(prefix + suffix)
            if runs is not None:
                runs.close()
    except BaseException:
        if runs is not None:
            runs.discard()
        raise
    return writer, runs.digest if runs is not None else None


def _few_parts(name: str, parts: Sequence[Part], dtype: type) -> Sequence[Part]:
    """No more parts than may be open at once."""
    if len(parts) <= fan_in():
        return parts
    progress, written = DocumentProgress(f"{name} combined"), 0
    total, documents = (sum(getattr(part.record, count) for part in parts) for count in ("tokens", "documents"))

    def done(tokens: int) -> None:
        nonlocal written
        written += tokens
        progress.update(min(written / total, 1.0), documents, written)

    parts = combine_parts(parts, fan_in(), dtype, bucket_bytes=BUCKET_BYTES, done=done)
    progress.update(1.0, documents, written)  # of the last pass, it may be a few parts only
    progress.close()
    return parts
