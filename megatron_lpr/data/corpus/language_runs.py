"""The sidecar `<prefix>.lang` of a corpus that mixes languages: runs of neighbouring tokens of one language.

Layout, little-endian: magic LPRLANG1 (8 bytes), number of runs R u64, first token of each run u64 [R] (the first is 0,
strictly increasing), language of each run u16 [R] (a position in the `languages` of the manifest's entry). A run
ends where the next begins, the last one at the corpus' end. An end-of-document token belongs to the language before it.
"""

import bisect
import contextlib
import hashlib
import os
import shutil
import struct

import numpy as np

from megatron_lpr.errors import UserError
from megatron_lpr.files.file_array import FileArray

MAGIC = b"LPRLANG1"
MAX_LANGUAGES = 1 << 16
_HEADER = struct.Struct("<8sQ")
_CHUNK = 1 << 16


class LanguageRunsWriter:
    """Writes the runs of tokens that come in order, in constant memory; the file gets its name in `close`.

    Attributes:
        digest: SHA-256 of the file, hexadecimal; known after `close`.
    """

    def __init__(self, prefix: str):
        self._path = f"{prefix}.lang"
        self._runs = 0
        self._tokens = 0
        self._last = -1
        self.digest: str | None = None
        self._firsts = open(f"{self._path}.partial", "w+b")
        self._languages = open(f"{self._path}.partial2", "w+b")
        self._firsts.write(_HEADER.pack(MAGIC, 0))

    def add(self, languages: np.ndarray) -> None:
        """Takes the languages [n] of the next n tokens."""
        before = np.concatenate(([self._last], languages[:-1].astype(np.int64)))
        changes = np.flatnonzero(languages != before)
        self._firsts.write((changes + self._tokens).astype("<u8").tobytes())
        self._languages.write(languages[changes].astype("<u2").tobytes())
        self._runs += len(changes)
        self._tokens += len(languages)
        self._last = int(languages[-1])

    def close(self) -> None:
        self._languages.seek(0)
        shutil.copyfileobj(self._languages, self._firsts)
        self._firsts.seek(0)
        self._firsts.write(_HEADER.pack(MAGIC, self._runs))
        self._firsts.flush()
        os.fsync(self._firsts.fileno())
        self._firsts.seek(0)
        self.digest = hashlib.file_digest(self._firsts, "sha256").hexdigest()
        self._firsts.close()
        self._languages.close()
        os.remove(self._languages.name)
        os.replace(self._firsts.name, self._path)

    def discard(self) -> None:
        """Removes what was written."""
        for file in (self._firsts, self._languages):
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.remove(file.name)


class LanguageRuns:
    """Reads a sidecar where it is asked for; opening it reads its header and its two ends only.

    Attributes:
        firsts: first token of each run, uint64 [R]; languages: language of each run, uint16 [R] (file_array.py).

    Raises:
        UserError: the file is missing, truncated or corrupt; the message names it.
    """

    def __init__(self, prefix: str, *, num_tokens: int, num_languages: int):
        path = f"{prefix}.lang"
        try:
            with open(path, "rb") as file:
                header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}") from error
        if len(header) < _HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path} is no file of language runs (bad magic)")
        runs = _HEADER.unpack(header)[1]
        if runs == 0 or size != _HEADER.size + 10 * runs:
            raise UserError(f"{path} has the wrong size for {runs} runs: it is truncated or corrupt")
        self.path = path
        self._num_tokens, self._num_languages = num_tokens, num_languages
        self.firsts = FileArray(path, "<u8", offset=_HEADER.size, length=runs)
        self.languages = FileArray(path, "<u2", offset=_HEADER.size + 8 * runs, length=runs)
        if self.firsts[0] != 0 or self.firsts[-1] >= num_tokens:
            raise UserError(f"{path} is corrupt: its runs do not lie inside the corpus' {num_tokens} tokens")

    def __len__(self) -> int:
        return len(self.firsts)

    def of_tokens(self, first: int, count: int) -> np.ndarray:
        """Languages [count] of tokens [first, first + count), uint16. UserError where the runs met are corrupt."""
        assert 0 <= first and 0 < count and first + count <= self._num_tokens, f"tokens {first}, {count}"
        start = bisect.bisect_right(self.firsts, first) - 1
        end = bisect.bisect_left(self.firsts, first + count)
        # A corrupt file may mislead the search, so what it found is checked, not trusted.
        if not 0 < end - start <= count or self.firsts[start] > first or self.firsts[end - 1] >= first + count:
            raise UserError(f"{self.path} is corrupt: its runs near number {max(start, 0)} are not in order")
        self._check(start, end)
        bounds = np.clip(self.firsts[start:end].astype(np.int64), first, None)
        return np.repeat(self.languages[start:end], np.diff(bounds, append=first + count))

    def check(self) -> None:
        """Reads every run, in constant memory; UserError where one is corrupt."""
        for start in range(0, len(self), _CHUNK):
            self._check(start, min(start + _CHUNK + 1, len(self)))

    def _check(self, start: int, end: int) -> None:
        firsts = self.firsts[start:end]
        if np.any(firsts[:-1] >= firsts[1:]):
            raise UserError(f"{self.path} is corrupt: its runs near number {start} are not in order")
        if self.languages[start:end].max() >= self._num_languages:
            raise UserError(f"{self.path} is corrupt: it names more languages than the {self._num_languages} there are")
