"""Text to training data: text files -> shuffled Megatron corpora + entries in the manifest.

    files --blocks of documents--> parts (tokens, sorted by key) --merge by key--> <name>.bin / .idx (/ .lang)
             one reader               one process per core                          one writer

Windows of the replay sampler are contiguous, so documents are shuffled once, here. Memory does not grow with the
corpus. A killed run continues with the parts it had finished, and ends with the same bytes.
"""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator

from megatron_lpr.data.corpus.manifest import Corpus, Manifest
from megatron_lpr.data.corpus.tokenizer_record import check_same_tokenizer, record_of
from megatron_lpr.data.preprocess.entries import check_roles, take_up
from megatron_lpr.data.preprocess.existing import existing_corpus
from megatron_lpr.data.preprocess.make_corpus import make_corpus
from megatron_lpr.data.text.source_checks import check_files, check_plug_ins, check_sources, way_of_reading
from megatron_lpr.data.text.special_tokens import special_tokens
from megatron_lpr.data.text.text_files import expand, files_sha256
from megatron_lpr.data.text.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.files.locks import FolderLocks
from megatron_lpr.files.output_place import check_place
from megatron_lpr.recipe.text_settings import PreprocessConfig, SourceConfig


def preprocess(settings: PreprocessConfig, *, overwrite: bool = False) -> Manifest:
    """Writes each corpus and its entry in the output's manifest.yaml; safe to kill, and to repeat.

    A corpus that is already there, made from the same text in the same way, is kept; only its languages' roles and
    its weight are taken over. An end-of-document token follows every document, a BOS token opens it where there is
    one. A corpus with a `prefix` is there already and gets its entry only. Lines that are left out are listed in
    <name>.bad_lines.txt; documents that are held out lie in <name>.heldout.jsonl.gz. A process of
    `settings.workers` holds about 200 MB and the tokenizer, and 140 to 210 bytes for each byte of its longest document.

    Args:
        settings: with an output folder and a tokenizer.
        overwrite: replace a corpus of the same name that was made from something else.

    Raises:
        UserError: missing files or tokenizer, a bad line, an empty corpus, a bad name, role or weight, settings that
            contradict each other, a corpus that would be replaced, or an output folder that holds corpora of another
            tokenizer. All but bad lines and empty corpora are found before anything is written.
    """
    corpora, tokenizer, manifest = check(settings)
    folder = os.path.dirname(manifest.path)
    texts = [files_sha256(source.files, way_of_reading(source, settings)) for source in corpora]
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {folder}: {error.strerror}") from error
    read = functools.partial(_open_manifest, manifest.path, tokenizer)
    with FolderLocks(folder) as locks:
        wanted = list(zip(corpora, texts, strict=True))
        entries, to_make = take_up(read, wanted, settings, locks, overwrite=overwrite)
        with _interrupts_told(), entries:
            for source, sha256 in to_make:
                if source.prefix is not None:
                    corpus = existing_corpus(source, manifest.tokenizer)
                    _tell_of_change(manifest, corpus)
                else:
                    corpus = make_corpus(source, settings, tokenizer, sha256)
                entries.add([corpus])
    return read()


def check(settings: PreprocessConfig) -> tuple[list[SourceConfig], Tokenizer, Manifest]:
    """What needs no reading of text: the sources with their patterns replaced, the tokenizer, the manifest so far.

    Raises:
        UserError: as `preprocess`.
    """
    assert settings.output is not None and settings.tokenizer is not None
    check_sources(settings)
    check_place(settings.output)
    corpora = [dataclasses.replace(source, files=_files(source)) for source in settings.corpora]
    check_files(corpora)
    tokenizer = load_tokenizer(settings.tokenizer, engine=settings.engine, special=special_tokens(settings))
    manifest = _open_manifest(os.path.join(settings.output, "manifest.yaml"), tokenizer)
    for source in corpora:
        check_plug_ins(source)
    check_roles(manifest, corpora)
    return corpora, tokenizer, manifest


@contextlib.contextmanager
def _interrupts_told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept: run the same command again to go on from there", file=sys.stderr)
        raise


def _tell_of_change(manifest: Manifest, corpus: Corpus) -> None:
    before = next((entry for entry in manifest.corpora if entry.name == corpus.name), corpus)
    if (before.digest, before.language_digest) != (corpus.digest, corpus.language_digest):
        print(
            f"{corpus.name}: {corpus.prefix}.bin holds other tokens than its entry in {manifest.path} said; the entry "
            "is renewed, and runs that read the old ones cannot be resumed",
            file=sys.stderr,
        )


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
