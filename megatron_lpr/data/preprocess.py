"""Text to training data: JSONL files of one language -> shuffled Megatron corpus + entry in the manifest.

    JSONL --tokenizer, all cores--> documents in file order --keyed permutation--> <name>.bin / <name>.idx

Windows of the replay sampler are contiguous, so documents are shuffled once, here. Both passes stream: the
first writes an unshuffled corpus beside the result, the second copies its documents in the permuted order.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lpr._replay_sampler import permute
from megatron_lpr.data.indexed import IndexedCorpus, IndexedWriter
from megatron_lpr.data.jsonl import JsonlReader, OnBadLine, files_sha256
from megatron_lpr.data.manifest import Corpus, Manifest, Source, TokenizerRecord, check_language_roles
from megatron_lpr.data.progress import Progress
from megatron_lpr.data.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4 << 20
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """Text of one corpus: JSONL files (.gz too) in one language."""

    name: str
    files: tuple[str, ...]
    language: str
    role: str
    weight: float = 1.0


def preprocess(
    corpora: Sequence[CorpusSource],
    *,
    tokenizer_dir: str,
    output_dir: str,
    seed: int = 0,
    on_bad_line: OnBadLine = "refuse",
    overwrite: bool = False,
) -> Manifest:
    """Writes each corpus and its entry in `output_dir`/manifest.yaml; safe to repeat.

    A corpus that is already there, made from the same text with the same tokenizer and seed, is kept; only
    its language, role and weight are taken over. An end-of-document token follows every document.

    Args:
        seed: of the document shuffle, 0 <= seed < 2^63.
        on_bad_line: `refuse` stops at the first bad line; `skip` leaves bad lines out and reports them.
        overwrite: replace a corpus of the same name that was made from something else.

    Raises:
        UserError: missing files or tokenizer, a bad line, an empty corpus, a bad name, role or weight, a
            corpus that would be replaced, or an output folder that holds corpora of another tokenizer. All
            but bad lines and empty corpora are found before anything is written.
    """
    _check(corpora, seed)
    tokenizer = load_tokenizer(tokenizer_dir)
    manifest = _open_manifest(os.path.join(output_dir, "manifest.yaml"), tokenizer)
    made_from = [files_sha256(source.files) for source in corpora]
    kept = _kept(manifest, list(zip(corpora, made_from, strict=True)), seed, on_bad_line, overwrite)
    others = [corpus for corpus in manifest.corpora if corpus.name not in {source.name for source in corpora}]
    check_language_roles(manifest.path, ((c.name, c.language, c.role) for c in (*others, *corpora)))

    os.makedirs(output_dir, exist_ok=True)
    for source, sha256 in zip(corpora, made_from, strict=True):
        corpus = kept.get(source.name)
        if corpus is None:
            corpus = _write_corpus(source, tokenizer, output_dir, sha256, seed, on_bad_line)
        else:
            print(f"{source.name}: unchanged, its {corpus.documents:,} documents are kept", file=sys.stderr)
            corpus = dataclasses.replace(
                corpus, language=source.language, role=source.role, weight=float(source.weight)
            )
        manifest = manifest.with_corpus(corpus)
        manifest.save()
    return manifest


def _check(corpora: Sequence[CorpusSource], seed: int) -> None:
    if not corpora:
        raise UserError("no corpora to preprocess: name at least one")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"the shuffle's seed must be in [0, 2^63), not {seed}")
    names = set()
    for source in corpora:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", source.name):
            raise UserError(f"corpus name '{source.name}' is no file name: use letters, digits and . _ -")
        if source.name in names:
            raise UserError(f"two corpora are called '{source.name}'; give each its own name")
        names.add(source.name)
        if not source.files:
            raise UserError(f"corpus '{source.name}' names no text files")
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise UserError(f"corpus '{source.name}': weight must be a positive number, not {source.weight}")


def _open_manifest(path: str, tokenizer: Tokenizer) -> Manifest:
    record = TokenizerRecord(
        name=tokenizer.name, vocab_size=tokenizer.vocab_size, sha256=tokenizer.sha256, eod_id=tokenizer.eod_id
    )
    if not os.path.exists(path):
        return Manifest(path=path, tokenizer=record, corpora=())
    manifest = Manifest.load(path, check_files=False)
    if dataclasses.replace(manifest.tokenizer, name=record.name) != record:
        raise UserError(
            f"{path} holds corpora of another tokenizer ({manifest.tokenizer.name}, not {record.name}); "
            "choose another output folder"
        )
    return manifest


def _kept(
    manifest: Manifest,
    sources: Sequence[tuple[CorpusSource, str]],
    seed: int,
    on_bad_line: OnBadLine,
    overwrite: bool,
) -> dict[str, Corpus]:
    """Entries that need not be made again."""
    kept = {}
    present = {corpus.name: corpus for corpus in manifest.corpora}
    for source, sha256 in sources:
        corpus = present.get(source.name)
        if corpus is None:
            continue
        made = corpus.source
        if made is not None and (made.sha256, made.seed) == (sha256, seed):
            if _is_intact(manifest, corpus) and (made.skipped_lines == 0 or on_bad_line == "skip"):
                kept[source.name] = corpus
        elif not overwrite:
            raise UserError(
                f"corpus '{source.name}' in {manifest.path} was made from other text or with another seed; "
                "pass --overwrite to replace it, or choose another name"
            )
    return kept


def _is_intact(manifest: Manifest, corpus: Corpus) -> bool:
    try:
        manifest.check_files(corpus)
    except UserError as error:
        print(f"{corpus.name}: made again, because {error}", file=sys.stderr)
        return False
    return True


def _write_corpus(
    source: CorpusSource,
    tokenizer: Tokenizer,
    output_dir: str,
    sha256: str,
    seed: int,
    on_bad_line: OnBadLine,
) -> Corpus:
    prefix = os.path.join(output_dir, source.name)
    reader = JsonlReader(source.files, on_bad_line)
    unshuffled = f"{prefix}.unshuffled"
    try:
        with IndexedWriter(unshuffled, tokenizer.vocab_size) as writer:
            _tokenize(reader, tokenizer, writer, Progress(source.name))
            if writer.documents == 0:
                raise UserError(f"corpus '{source.name}' is empty: no usable document in {', '.join(source.files)}")
        with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
            _shuffle(IndexedCorpus(unshuffled), writer, seed, stream=int(sha256[:16], 16))
    finally:
        for suffix in (".bin", ".idx"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(unshuffled + suffix)
    for reason, (count, first) in reader.skipped_by_reason.items():
        print(f"{source.name}: left out {count:,} lines ({reason}), the first at {first}", file=sys.stderr)
    return Corpus(
        name=source.name,
        prefix=prefix,
        language=source.language,
        role=source.role,
        weight=float(source.weight),
        documents=writer.documents,
        tokens=writer.tokens,
        digest=writer.digest,
        source=Source(sha256=sha256, seed=seed, skipped_lines=reader.skipped),
    )


def _tokenize(reader: JsonlReader, tokenizer: Tokenizer, writer: IndexedWriter, progress: Progress) -> None:
    for texts in _batches(reader):
        for ids in tokenizer.encode_batch(texts):
            writer.add_document(np.array([*ids, tokenizer.eod_id], dtype=np.int64))
        progress.update(reader.bytes_read / reader.bytes_total, writer.documents, writer.tokens)
    progress.close()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shuffle(documents: IndexedCorpus, writer: IndexedWriter, seed: int, stream: int) -> None:
    size = len(documents)
    for first in range(0, size, _CHUNK):
        for index in permute(size, seed, stream, 0, first, min(_CHUNK, size - first)):
            writer.add_document(documents.document(int(index)))
