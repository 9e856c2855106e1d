"""Tensors that are still on disk: what is asked for is read or copied, and nothing stays behind.

Bytes are read, not mapped: every page of a mapped file that was touched counts as this process' memory until the file
is closed, so that converting a model through a mapping takes as much memory as the model.
"""

import errno
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from megatron_lpr.errors import UserError

Shape = tuple[int, ...]
_BLOCK_BYTES = 2**24
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


class Narrowable(Protocol):
    """A tensor, or one still on disk: a range of rows or columns is all that conversion asks for."""

    @property
    def shape(self) -> Shape: ...

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor: ...


def _nobody(number_of_bytes: int) -> None:
    pass


@dataclass(frozen=True)
class FileTensor:
    """A row-major tensor at a byte offset of a file. Indexing reads that part and nothing else: `t[a:b]`, `t[:, a:b]`.

    told: gets the bytes of each read.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape
    told: Callable[[int], object] = field(default=_nobody, compare=False, repr=False)

    def __getitem__(self, index: slice | tuple[slice, slice]) -> torch.Tensor:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        if not columns:
            return self._read(start, stop)
        first, last, step = columns[0].indices(self.shape[1])
        assert step == 1
        return self._read(start, stop, (first, last))

    def select(self, dim: int, index: int) -> "FileTensor":
        """As torch.Tensor.select, along the first dimension; not read yet."""
        assert dim == 0 and 0 <= index < self.shape[0], (dim, index, self.shape)
        row = self.rows(index, index + 1)
        return replace(row, shape=row.shape[1:])

    def rows(self, start: int, stop: int) -> "FileTensor":
        """A range of rows, not read yet."""
        skipped = start * math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, offset=self.offset + skipped, shape=(stop - start, *self.shape[1:]))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of parts of about 16 MiB, at least a row each."""
        row_bytes = max(math.prod(self.shape[1:]), 1) * self.dtype.itemsize
        rows = max(_BLOCK_BYTES // row_bytes, 1)
        for start in range(0, self.shape[0], rows):
            yield start, min(rows, self.shape[0] - start)

    def copy_to(self, file: int, offset: int, dtype: torch.dtype) -> None:
        """Writes the tensor at `offset` of an open file, by the kernel where nothing is cast, in blocks otherwise.

        OSError when it cannot be written, UserError when it cannot be read.
        """
        if dtype != self.dtype or not self._copied_by_kernel(file, offset):
            for start, length in self.blocks():
                block = tensor_bytes(self.narrow(0, start, length).to(dtype))
                write_at(file, block, offset)
                offset += len(block)

    def _copied_by_kernel(self, file: int, offset: int) -> bool:
        left, start = math.prod(self.shape) * self.dtype.itemsize, self.offset
        with _open(self.path) as source:
            while left:
                try:
                    copied = os.copy_file_range(source.fileno(), file, left, start, offset)
                except OSError as error:
                    if error.errno in _NOT_HERE:
                        return False
                    raise
                if not copied:
                    raise _truncated(self.path)
                left, start, offset = left - copied, start + copied, offset + copied
        return True

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """As torch.Tensor.narrow; along the first two dimensions nothing else is read."""
        if dim == 0:
            return self._read(start, start + length)
        if dim == 1:
            return self._read(0, self.shape[0], (start, start + length))
        return self._read(0, self.shape[0]).narrow(dim, start, length)

    def _read(self, start: int, stop: int, columns: tuple[int, int] | None = None) -> torch.Tensor:
        """Some rows, or of each of them some columns, which lie together."""
        inner, width = self.shape[1:], math.prod(self.shape[1:]) * self.dtype.itemsize
        if columns is None or columns == (0, self.shape[1]):
            pieces, piece, first = 1, (stop - start) * width, start * width
        else:
            column = math.prod(self.shape[2:]) * self.dtype.itemsize
            inner = (columns[1] - columns[0], *self.shape[2:])
            pieces, piece, first = stop - start, inner[0] * column, start * width + columns[0] * column
        found = torch.empty((stop - start, *inner), dtype=self.dtype, device="cpu")  # whatever the caller's default
        if found.numel() == 0:
            return found
        buffer = tensor_bytes(found)
        with _open(self.path) as file:
            for number in range(pieces):
                _read_at(file, buffer[number * piece :][:piece], self.offset + first + number * width)
        self.told(len(buffer))
        return found


def _read_at(file: io.FileIO, buffer: memoryview, offset: int) -> None:
    while buffer:  # one call reads 2 GiB at most
        read = os.preadv(file.fileno(), [buffer], offset)
        if not read:
            raise _truncated(Path(file.name))
        buffer, offset = buffer[read:], offset + read


def same_bits(there: FileTensor, expected: Narrowable, share: tuple[int, int] = (0, 1)) -> bool:
    """Whether two tensors are equal, bit for bit once `expected` is cast to the dtype of `there`; block by block.

    share: (number, of so many) equal parts of the blocks, of which this one is compared.
    """
    if there.shape != tuple(expected.shape):
        return False
    number, of = share
    return all(
        equal_bytes(there.narrow(0, *block), expected.narrow(0, *block).detach().cpu().to(there.dtype))
        for block in itertools.islice(there.blocks(), number, None, of)
    )


def equal_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """`==` would see neither NaN nor the sign of zero."""
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _open(path: Path) -> io.FileIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def _truncated(path: Path) -> UserError:
    return UserError(f"'{path}' is truncated: copy or download it again")


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset` of an open file. OSError when the disk is full."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
