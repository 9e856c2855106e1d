"""Text to training data: text files -> shuffled Megatron corpora + entries in the manifest.

    files --blocks of documents--> parts (tokens, sorted by key) --merge by key--> <name>.bin / .idx (/ .lang)
             one reader               one process per core                          one writer

Windows of the replay sampler are contiguous, so documents are shuffled once, here. Memory does not grow with the
corpus. A killed run continues with the parts it had finished, and ends with the same bytes.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence

from megatron_lpr.data.corpus.manifest import Corpus, Manifest, check_language_roles, language_roles
from megatron_lpr.data.corpus.spot_check import check_all_bytes, check_spots, with_checksums
from megatron_lpr.data.corpus.tokenizer_record import check_same_tokenizer, record_of
from megatron_lpr.data.preprocess.existing import existing_corpus
from megatron_lpr.data.preprocess.make_corpus import make_corpus
from megatron_lpr.data.preprocess.pending_entries import PendingEntries, contradicts
from megatron_lpr.data.preprocess.work_folder import work_folder
from megatron_lpr.data.text.documents import OnBadLine
from megatron_lpr.data.text.source_checks import check_files, check_plug_ins, check_sources, way_of_reading
from megatron_lpr.data.text.special_tokens import AS_THE_TOKENIZER_DOES, SpecialTokens
from megatron_lpr.data.text.text_files import expand, files_sha256
from megatron_lpr.data.text.tokenize import Engine, Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.files.locks import FolderLocks
from megatron_lpr.recipe.settings import PreprocessConfig, SourceConfig


def preprocess(
    corpora: Sequence[SourceConfig],
    *,
    tokenizer_dir: str,
    output_dir: str,
    seed: int = 0,
    on_bad_line: OnBadLine = "refuse",
    max_document_bytes: int = PreprocessConfig.max_document_bytes,
    workers: int = 0,
    engine: Engine = "tokenizers",
    special: SpecialTokens = AS_THE_TOKENIZER_DOES,
    overwrite: bool = False,
) -> Manifest:
    """Writes each corpus and its entry in `output_dir`/manifest.yaml; safe to kill, and to repeat.

    A corpus that is already there, made from the same text in the same way, is kept; only its languages' roles and
    its weight are taken over. An end-of-document token follows every document, a BOS token opens it where there is
    one. A corpus with a `prefix` is there already and gets its entry only.

    Args:
        seed: of the document shuffle, 0 <= seed < 2^63.
        on_bad_line: `refuse` stops at the first bad line; `skip` leaves bad lines out, and lists them in
            <name>.bad_lines.txt.
        max_document_bytes: a longer document is a bad line; 0: no limit.
        workers: processes; 0 is one per core. Each holds about 200 MB and the tokenizer, and 140 to 210 bytes for each
            byte of its longest document.
        engine: what reads a tokenizer.json; fastokens gives the same tokens faster, and is checked on samples. Corpora
            with a tagger need the offsets that tokenizers has.
        special: whether a token opens a document, and what control tokens inside a text are; alike in all corpora of
            a manifest.
        overwrite: replace a corpus of the same name that was made from something else.

    Raises:
        UserError: missing files or tokenizer, a bad line, an empty corpus, a bad name, role or weight, settings that
            contradict each other, a corpus that would be replaced, or an output folder that holds corpora of another
            tokenizer. All but bad lines and empty corpora are found before anything is written.
    """
    corpora, tokenizer, manifest = check(
        corpora, tokenizer_dir=tokenizer_dir, output_dir=output_dir, seed=seed, engine=engine, special=special
    )
    made_from = [files_sha256(source.files, way_of_reading(source, max_document_bytes)) for source in corpora]
    sources = list(zip(corpora, made_from, strict=True))
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {output_dir}: {error.strerror}") from error
    with FolderLocks(output_dir) as locks:
        entries, to_make = _take_up(manifest.path, tokenizer, sources, locks, seed, on_bad_line, overwrite)
        with _interrupts_told(), entries:
            for source, sha256 in to_make:
                if source.prefix is not None:
                    corpus = existing_corpus(source, manifest.tokenizer)
                    _tell_of_change(manifest, corpus)
                else:
                    corpus = make_corpus(
                        source,
                        prefix=os.path.join(output_dir, source.name),
                        tokenizer=tokenizer,
                        tokenizer_dir=tokenizer_dir,
                        sha256=sha256,
                        seed=seed,
                        on_bad_line=on_bad_line,
                        max_document_bytes=max_document_bytes,
                        workers=workers or len(os.sched_getaffinity(0)),
                        engine=engine,
                        special=special,
                    )
                entries.add([corpus])
    return _open_manifest(manifest.path, tokenizer)


@contextlib.contextmanager
def _interrupts_told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept: run the same command again to go on from there", file=sys.stderr)
        raise


def _take_up(
    path: str,
    tokenizer: Tokenizer,
    sources: Sequence[tuple[SourceConfig, str]],
    locks: FolderLocks,
    seed: int,
    on_bad_line: OnBadLine,
    overwrite: bool,
) -> tuple[PendingEntries, list[tuple[SourceConfig, str]]]:
    """Enters the corpora that are kept, and takes the locks of those to be made, which it returns.

    All in one step: who has a corpus' lock, and has read the manifest since, knows that nobody makes it meanwhile.
    """
    with locks.manifest():
        manifest = _open_manifest(path, tokenizer)
        _check_roles(manifest, [source for source, _ in sources])
        kept = _kept(manifest, sources, seed, on_bad_line, overwrite)
        to_make = [(source, sha256) for source, sha256 in sources if source.name not in kept]
        names = {source.name for source, _ in to_make}
        replaced = [corpus for corpus in manifest.corpora if corpus.name in names]
        at_the_end = contradicts(replaced, [source for source, _ in sources])
        for name in [source.name for source, _ in sources] if at_the_end else names:
            locks.take(name)
        entries = PendingEntries(lambda: _open_manifest(path, tokenizer), locks, at_the_end=at_the_end)
        if at_the_end:
            entries.add(kept.values())
        elif kept:
            manifest.with_corpora(kept.values()).save()
            _remove_left_overs(path, kept, locks)
        return entries, to_make


def _tell_of_change(manifest: Manifest, corpus: Corpus) -> None:
    before = next((entry for entry in manifest.corpora if entry.name == corpus.name), corpus)
    if (before.digest, before.language_digest) != (corpus.digest, corpus.language_digest):
        print(
            f"{corpus.name}: {corpus.prefix}.bin holds other tokens than its entry in {manifest.path} said; the entry "
            "is renewed, and runs that read the old ones cannot be resumed",
            file=sys.stderr,
        )


def _remove_left_overs(path: str, names: Iterable[str], locks: FolderLocks) -> None:
    """Work folders of a run that was killed when it had entered its corpus."""
    for name in names:
        folder = work_folder(os.path.join(os.path.dirname(path), name))
        if os.path.exists(folder):
            with contextlib.suppress(UserError):  # another process has it
                locks.take(name)
                shutil.rmtree(folder, ignore_errors=True)
                locks.release(name)


def _with_settings(corpus: Corpus, source: SourceConfig) -> Corpus:
    """A kept entry with what may change without making the corpus again."""
    print(f"{source.name}: unchanged, its {corpus.documents:,} documents are kept", file=sys.stderr)
    return dataclasses.replace(
        corpus if corpus.spot_digests else with_checksums(corpus),
        language=source.language,
        role=source.role,
        weight=float(source.weight),
        languages=dict(source.languages) or None,
    )


def check(
    corpora: Sequence[SourceConfig],
    *,
    tokenizer_dir: str,
    output_dir: str,
    seed: int,
    engine: Engine = "tokenizers",
    special: SpecialTokens = AS_THE_TOKENIZER_DOES,
) -> tuple[list[SourceConfig], Tokenizer, Manifest]:
    """What needs no reading of text: the sources with their patterns replaced, the tokenizer, the manifest so far.

    Raises:
        UserError: as `preprocess`.
    """
    check_sources(corpora, seed)
    corpora = [dataclasses.replace(source, files=_files(source)) for source in corpora]
    check_files(corpora)
    tokenizer = load_tokenizer(tokenizer_dir, engine=engine, special=special)
    manifest = _open_manifest(os.path.join(output_dir, "manifest.yaml"), tokenizer)
    for source in corpora:
        check_plug_ins(source)
    _check_roles(manifest, corpora)
    return corpora, tokenizer, manifest


def _check_roles(manifest: Manifest, corpora: Sequence[SourceConfig]) -> None:
    names = {source.name for source in corpora}
    others = [corpus for corpus in manifest.corpora if corpus.name not in names]
    check_language_roles(manifest.path, (triple for corpus in (*others, *corpora) for triple in language_roles(corpus)))


def _files(source: SourceConfig) -> tuple[str, ...]:
    try:
        return expand(source.files)
    except UserError as error:
        raise UserError(f"preprocess.corpora: {source.name}: {error}") from None


def _open_manifest(path: str, tokenizer: Tokenizer) -> Manifest:
    record = record_of(tokenizer)
    if not os.path.exists(path):
        return Manifest(path=path, tokenizer=record, corpora=())
    manifest = Manifest.load(path, check_files=False)
    check_same_tokenizer(path, manifest.tokenizer, record)
    return manifest


def _kept(
    manifest: Manifest,
    sources: Sequence[tuple[SourceConfig, str]],
    seed: int,
    on_bad_line: OnBadLine,
    overwrite: bool,
) -> dict[str, Corpus]:
    """Entries that need not be made again.

    Raises:
        UserError: a corpus would be replaced, and `overwrite` does not say so.
    """
    kept = {}
    present = {corpus.name: corpus for corpus in manifest.corpora}
    for source, sha256 in sources:
        corpus = present.get(source.name)
        if corpus is None:
            if not overwrite and source.prefix is None:
                _check_vacant(manifest, source.name)
        elif source.prefix is not None:
            if not overwrite and (corpus.source is not None or not _same_file(source.prefix, corpus.prefix)):
                raise _would_replace(manifest, source.name)
        elif corpus.source is not None and (corpus.source.sha256, corpus.source.seed) == (sha256, seed):
            if _is_intact(manifest, corpus) and (corpus.source.skipped_lines == 0 or on_bad_line == "skip"):
                kept[source.name] = _with_settings(corpus, source)
        elif not overwrite:
            raise _would_replace(manifest, source.name)
    return kept


def _check_vacant(manifest: Manifest, name: str) -> None:
    prefix = os.path.join(os.path.dirname(manifest.path), name)
    if os.path.exists(f"{prefix}.bin") and not os.path.exists(work_folder(prefix)):
        raise UserError(
            f"{prefix}.bin is there, but not in {manifest.path}; take it over by prefix: {prefix}, choose another "
            "name, or pass --overwrite to replace it"
        )


def _same_file(prefix: str, other: str) -> bool:
    return os.path.realpath(prefix) == os.path.realpath(other)


def _would_replace(manifest: Manifest, name: str) -> UserError:
    return UserError(
        f"corpus '{name}' in {manifest.path} was made from other text, in another way or with another seed; "
        "pass --overwrite to replace it, or choose another name"
    )


def _is_intact(manifest: Manifest, corpus: Corpus) -> bool:
    try:
        manifest.check_files(corpus)
        (check_spots if corpus.spot_digests else check_all_bytes)(corpus)
    except UserError as error:
        print(f"{corpus.name}: made again, because {error}", file=sys.stderr)
        return False
    return True
