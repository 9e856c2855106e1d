"""A file as an array that is read where it is indexed, by pread: a memory map would end the process with
SIGBUS where somebody cuts the file short, or its file system fails."""

import os

import numpy as np

from megatron_lpr.errors import UserError

_CHUNK = 1 << 22


class FileArray:
    """The first `length` numbers of `dtype` in a file, or all; `array[i]`, `[i:j]` and `[indices]` read them.

    Attributes:
        dtype, itemsize: of the numbers.

    Raises:
        UserError: the file cannot be opened, or not be read to the end of what is asked for; the message names it.
    """

    def __init__(self, path: str, dtype, *, length: int | None = None):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.itemsize = self.dtype.itemsize
        try:
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}") from error
        self._length = os.fstat(self._file.fileno()).st_size // self.itemsize if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        """A number, a slice of step 1, or the numbers [n] at sorted indices [n]."""
        if isinstance(index, slice):
            start, end, step = index.indices(self._length)
            assert step == 1, "slices have step 1"
            return self._read(start, max(end, start))
        if isinstance(index, np.ndarray):
            return self._gather(index)
        index = range(self._length)[index]
        return self._read(index, index + 1)[0]

    def _read(self, start: int, end: int) -> np.ndarray:
        numbers = np.empty(end - start, self.dtype)
        left = numbers.data.cast("B") if len(numbers) else memoryview(b"")
        place = start * self.itemsize
        while left:
            try:
                got = os.preadv(self._file.fileno(), [left], place)
            except OSError as error:
                raise UserError(f"cannot read {self.path}: {error.strerror}") from error
            if got == 0:
                raise UserError(f"{self.path} was cut short while it was read; restore it and start again")
            left, place = left[got:], place + got
        return numbers

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        numbers = np.empty(len(indices), self.dtype)
        first = 0
        while first < len(indices):
            low = int(indices[first])
            end = int(np.searchsorted(indices, low + _CHUNK))
            assert end > first, "indices are sorted"
            block = self[low : int(indices[end - 1]) + 1]
            numbers[first:end] = block[indices[first:end] - low]
            first = end
        return numbers
