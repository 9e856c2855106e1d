"""Entries of corpora in a manifest that other processes write to as well: which are kept, and how new ones get in."""

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from megatron_lpr.data.corpus.manifest import HELD_OUT, Corpus, Manifest, check_language_roles, language_roles
from megatron_lpr.data.corpus.spot_check import check_held_out, check_spots
from megatron_lpr.data.preprocess.work_folder import work_folder
from megatron_lpr.errors import UserError
from megatron_lpr.files.locks import FolderLocks
from megatron_lpr.recipe.text_settings import PreprocessConfig, SourceConfig

_SHARE_OF_TIME = 0.1

Wanted = tuple[SourceConfig, str]  # a source, and the SHA-256 of its text and of the way that is read


class PendingEntries:
    """Enters corpora into the manifest as it is on disk at that moment, so that others' entries stay.

    Each time the whole file is written, so with thousands of corpora not for each: at most a tenth of the time goes
    there. Until its entry is written a corpus keeps its lock and its work folder, from which a killed run has it again.
    Leaving the `with` block writes what is left, after an error too.

    Args:
        read: the manifest of now, checked to belong to the same tokenizer.
        at_the_end: write once, because single entries would contradict others that are still to be replaced.

    Raises:
        UserError: what another process wrote meanwhile contradicts the corpora, or the file cannot be written.
    """

    def __init__(self, read: Callable[[], Manifest], locks: FolderLocks, *, at_the_end: bool = False):
        self._read = read
        self._locks = locks
        self._next = float("inf") if at_the_end else 0.0
        self._corpora: list[Corpus] = []

    def __enter__(self) -> "PendingEntries":
        return self

    def __exit__(self, *error: object) -> None:
        self.write()

    def add(self, corpora: Iterable[Corpus]) -> None:
        self._corpora += corpora
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        if not self._corpora:
            return
        start = time.monotonic()
        corpora, self._corpora = self._corpora, []
        with self._locks.manifest():
            try:
                before = self._read()
                manifest = before.with_corpora(corpora)
            except UserError as error:
                names = ", ".join(f"'{corpus.name}'" for corpus in corpora)
                raise UserError(
                    f"corpus {names} is made but not entered, because the manifest was changed meanwhile: {error}"
                ) from None
            manifest.save()
            _remove_held_out(before, corpora)
        for corpus in corpora:
            shutil.rmtree(work_folder(os.path.join(os.path.dirname(manifest.path), corpus.name)), ignore_errors=True)
            self._locks.release(corpus.name)
        now = time.monotonic()
        self._next = max(self._next, now + (now - start) / _SHARE_OF_TIME)


def _remove_held_out(before: Manifest, corpora: Iterable[Corpus]) -> None:
    """What was held out of corpora that have since been made from all of their text."""
    whole = {corpus.name: corpus.prefix for corpus in corpora if corpus.source and not corpus.heldout}
    for corpus in before.corpora:
        if corpus.heldout and corpus.name in whole and _same_file(whole[corpus.name], corpus.prefix):
            with contextlib.suppress(FileNotFoundError):
                os.remove(corpus.held_out_file)


def take_up(
    read: Callable[[], Manifest],
    wanted: Sequence[Wanted],
    settings: PreprocessConfig,
    locks: FolderLocks,
    *,
    overwrite: bool,
) -> tuple[PendingEntries, list[Wanted]]:
    """Enters the corpora that are kept, and takes the locks of those to be made, which it returns.

    All in one step: who has a corpus' lock, and has read the manifest since, knows that nobody makes it meanwhile.

    Raises:
        UserError: a corpus would be replaced and `overwrite` does not say so, another process is making one of them, or
            a language has two roles.
    """
    sources = [source for source, _ in wanted]
    with locks.manifest():
        manifest = read()
        check_roles(manifest, sources)
        kept = _kept(manifest, wanted, settings, overwrite)
        to_make = [(source, sha256) for source, sha256 in wanted if source.name not in kept]
        names = {source.name for source, _ in to_make}
        replaced = [corpus for corpus in manifest.corpora if corpus.name in names]
        at_the_end = _contradicts(replaced, sources)
        for name in [source.name for source in sources] if at_the_end else names:
            locks.take(name)
        entries = PendingEntries(read, locks, at_the_end=at_the_end)
        if at_the_end:
            entries.add(kept.values())
        elif kept:
            manifest.with_corpora(kept.values()).save()
            _remove_left_overs(manifest.path, kept, locks)
        return entries, to_make


def check_roles(manifest: Manifest, sources: Sequence[SourceConfig]) -> None:
    """Raises UserError where a language would have two roles, among the sources and the entries they leave as is."""
    names = {source.name for source in sources}
    others = [corpus for corpus in manifest.corpora if corpus.name not in names]
    check_language_roles(manifest.path, (triple for corpus in (*others, *sources) for triple in language_roles(corpus)))


def _contradicts(entries: Iterable[Corpus], sources: Iterable[SourceConfig]) -> bool:
    """Whether a language has another role in `entries` than in `sources`."""
    triples = (triple for corpus in (*entries, *sources) for triple in language_roles(corpus))
    try:
        check_language_roles("", triples)
    except UserError:
        return True
    return False


def _kept(
    manifest: Manifest, wanted: Sequence[Wanted], settings: PreprocessConfig, overwrite: bool
) -> dict[str, Corpus]:
    """Entries that need not be made again. UserError where a corpus would be replaced and should not."""
    kept = {}
    present = {corpus.name: corpus for corpus in manifest.corpora}
    for source, sha256 in wanted:
        corpus = present.get(source.name)
        if corpus is None:
            if not overwrite and source.prefix is None:
                _check_vacant(manifest, source.name, settings)
        elif source.prefix is not None:
            if not overwrite and (corpus.source is not None or not _same_file(source.prefix, corpus.prefix)):
                raise _would_replace(manifest, source.name)
        elif corpus.source is not None and (corpus.source.sha256, corpus.source.seed) == (sha256, settings.seed):
            if _is_intact(manifest, corpus) and (corpus.source.skipped_lines == 0 or settings.on_bad_line == "skip"):
                kept[source.name] = _with_settings(corpus, source)
        elif not overwrite:
            _check_held_out(manifest, corpus, settings)
            raise _would_replace(manifest, source.name)
    return kept


def _check_held_out(manifest: Manifest, corpus: Corpus, settings: PreprocessConfig) -> None:
    """The more telling message where another share is held out."""
    share = corpus.heldout.share if corpus.heldout else 0.0
    if corpus.source is not None and share != settings.heldout:
        raise UserError(
            f"preprocess.heldout: {settings.heldout}; corpus '{corpus.name}' in {manifest.path} was made with {share}; "
            "pass --overwrite to make it again, or set it back"
        )


def _check_vacant(manifest: Manifest, name: str, settings: PreprocessConfig) -> None:
    prefix = os.path.join(os.path.dirname(manifest.path), name)
    if os.path.exists(work_folder(prefix)):
        return
    if settings.heldout and os.path.exists(f"{prefix}.{HELD_OUT}"):
        raise UserError(
            f"{prefix}.{HELD_OUT} is there, but not in {manifest.path}; choose another name for the corpus, or pass "
            "--overwrite to replace the file"
        )
    if os.path.exists(f"{prefix}.bin"):
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
        check_spots(corpus)
        check_held_out(corpus)
    except UserError as error:
        print(f"{corpus.name}: made again, because {error}", file=sys.stderr)
        return False
    return True


def _with_settings(corpus: Corpus, source: SourceConfig) -> Corpus:
    """A kept entry with what may change without making the corpus again."""
    print(f"{source.name}: unchanged, its {corpus.documents:,} documents are kept", file=sys.stderr)
    return dataclasses.replace(
        corpus,
        language=source.language,
        role=source.role,
        weight=float(source.weight),
        languages=dict(source.languages) or None,
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
