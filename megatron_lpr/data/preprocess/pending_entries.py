"""Finished corpora on their way into a manifest that other processes write to as well."""

import os
import shutil
import time
from collections.abc import Callable, Iterable

from megatron_lpr.data.corpus.manifest import Corpus, Manifest, check_language_roles, language_roles
from megatron_lpr.data.preprocess.work_folder import work_folder
from megatron_lpr.errors import UserError
from megatron_lpr.files.locks import FolderLocks

_SHARE_OF_TIME = 0.1


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

    def __exit__(self, *error) -> None:
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
                manifest = self._read().with_corpora(corpora)
            except UserError as error:
                names = ", ".join(f"'{corpus.name}'" for corpus in corpora)
                raise UserError(
                    f"corpus {names} is made but not entered, because the manifest was changed meanwhile: {error}"
                ) from None
            manifest.save()
        for corpus in corpora:
            shutil.rmtree(work_folder(os.path.join(os.path.dirname(manifest.path), corpus.name)), ignore_errors=True)
            self._locks.release(corpus.name)
        now = time.monotonic()
        self._next = max(self._next, now + (now - start) / _SHARE_OF_TIME)


def contradicts(entries: Iterable[Corpus], sources: Iterable) -> bool:
    """Whether a language has another role in `entries` than in `sources`."""
    triples = (triple for corpus in (*entries, *sources) for triple in language_roles(corpus))
    try:
        check_language_roles("", triples)
    except UserError:
        return True
    return False
