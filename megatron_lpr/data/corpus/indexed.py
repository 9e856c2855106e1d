"""Corpora on disk, written here and read by way of csrc/, which is the only place that takes their headers apart.

`<prefix>.bin` holds the tokens, `<prefix>.idx` the documents' boundaries (layout: csrc/reader.h; every document that we
write is one sequence), `<prefix>.lang` the languages of a corpus that mixes them.
"""

import contextlib
import hashlib
import os
import shutil
import struct

import numpy as np

from megatron_lpr._replay_sampler import Index
from megatron_lpr.errors import UserError
from megatron_lpr.files.file_array import FileArray

MAX_LANGUAGES = 1 << 16
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_LANG_HEADER = struct.Struct("<8sQ")
_LANG_MAGIC = b"LPRLANG1"
_DTYPE_OF_CODE: dict[int, type[np.integer]] = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_CHUNK = 1 << 16


def token_dtype(vocab_size: int) -> type[np.integer]:
    """What a token is stored as: uint16 where `vocab_size` is below 65,500, int32 otherwise (Megatron's rule)."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Writes a corpus in constant memory.

    Both files get their final names in `close`; leaving a `with` block by an exception discards them.

    Attributes:
        dtype: of the stored tokens.
        documents, tokens: how many were added so far.
        digest: SHA-256 of the .bin file, hexadecimal; known after `close`.
    """

    def __init__(self, prefix: str, vocab_size: int):
        self.prefix = prefix
        self.documents = 0
        self.tokens = 0
        self.digest: str | None = None
        self.dtype = token_dtype(vocab_size)
        self._hash = hashlib.sha256()
        self._bin = open(f"{prefix}.bin.partial", "wb")
        self._idx = open(f"{prefix}.idx.partial", "w+b")
        self._write_header()

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends D documents: concatenated ids [T] in the corpus' dtype, which are not checked, and lengths [D]."""
        assert tokens.dtype == self.dtype and lengths.sum(dtype=np.int64) == len(tokens) and lengths.min() > 0
        data = np.ascontiguousarray(tokens).data
        self._bin.write(data)
        self._hash.update(data)
        self._idx.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def close(self) -> None:
        """Completes the index and renames both files into place.

        Raises:
            UserError: no document was added.
        """
        if self.documents == 0:
            self.discard()
            raise UserError(f"no document was written to {self.prefix}: the corpus is empty")
        self._append_offsets()
        for first in range(0, self.documents + 1, _CHUNK):
            boundaries = np.arange(first, min(first + _CHUNK, self.documents + 1), dtype=np.int64)
            self._idx.write(boundaries.tobytes())
        self._idx.seek(0)
        self._write_header()
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        # An old index must never stand beside new tokens: after a crash here the corpus is missing, not
        # wrong.
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{self.prefix}.idx")
        os.replace(self._bin.name, f"{self.prefix}.bin")
        os.replace(self._idx.name, f"{self.prefix}.idx")
        self.digest = self._hash.hexdigest()

    def discard(self) -> None:
        """Removes what was written."""
        for file in (self._bin, self._idx):
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.remove(file.name)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()

    def _write_header(self) -> None:
        code = _CODE_OF_DTYPE[self.dtype]
        self._idx.write(_HEADER.pack(_MAGIC, 1, code, self.documents, self.documents + 1))

    def _append_offsets(self) -> None:
        """Reads the lengths back in chunks and appends their running sum in bytes."""
        offset = 0
        for first in range(0, self.documents, _CHUNK):
            count = min(_CHUNK, self.documents - first)
            self._idx.seek(_HEADER.size + 4 * first)
            lengths = np.frombuffer(self._idx.read(4 * count), dtype=np.int32).astype(np.int64)
            ends = offset + np.cumsum(lengths * self.dtype().itemsize)
            self._idx.seek(0, os.SEEK_END)
            self._idx.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
            offset = int(ends[-1])


class LanguageRunsWriter:
    """Writes the sidecar `<prefix>.lang` of a corpus that mixes languages, in constant memory.

    Layout: csrc/languages.h. A run is of neighbouring tokens of one language, a position in the `languages` of the
    manifest's entry; an end-of-document token belongs to the language before it. The file gets its name in `close`.

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
        self._firsts.write(_LANG_HEADER.pack(_LANG_MAGIC, 0))

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
        self._firsts.write(_LANG_HEADER.pack(_LANG_MAGIC, self._runs))
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


class IndexedCorpus:
    """Reads a corpus that we or Megatron wrote, where it is asked for.

    Attributes:
        num_documents, num_tokens: sizes of the corpus.
        tokens: all tokens [num_tokens], documents concatenated; dtype as stored (file_array.py).

    Raises:
        UserError: a file is missing, truncated (then or later) or corrupt; the message names it.
    """

    def __init__(self, prefix: str):
        self._index = Index(prefix)
        self.prefix = prefix
        self.num_documents: int = self._index.documents
        self.num_tokens: int = self._index.tokens
        self.tokens = FileArray(f"{prefix}.bin", _DTYPE_OF_CODE[self._index.dtype_code], length=self.num_tokens)

    def __len__(self) -> int:
        return self.num_documents

    def document(self, index: int) -> np.ndarray:
        """Tokens [n] of one document. UserError where the index is corrupt there."""
        start, end = self.boundaries(index, 1)
        return self.tokens[start:end]

    def boundaries(self, first: int, count: int) -> np.ndarray:
        """Positions int64 [count + 1] where documents first, ..., first + count - 1 start, and the last one ends.

        Opening a corpus reads none of its boundaries; they are checked here.

        Raises:
            UserError: the index is corrupt there.
        """
        assert 0 <= first and 0 < count <= self.num_documents - first, f"documents {first}, {count}"
        return self._index.boundaries(first, count)
