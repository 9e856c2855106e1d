"""Tensors that are still on disk: what is asked for is read, and nothing stays behind.

Bytes are read, not mapped: every page of a mapped file that was touched counts as this process' memory until the file
is closed, so that converting a model through a mapping takes as much memory as the model.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_lpr.errors import UserError

Shape = tuple[int, ...]


class Narrowable(Protocol):
    """A tensor, or one still on disk: a range of rows or columns is all that conversion asks for."""

    @property
    def shape(self) -> Shape: ...

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class FileTensor:
    """A row-major tensor at a byte offset of a file. Indexing reads: `t[a:b]`, `t[:, a:b]`; `t[i]` does not yet."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape

    def __getitem__(self, index: "int | slice | tuple[slice, slice]") -> "FileTensor | torch.Tensor":
        if isinstance(index, int):
            assert 0 <= index < self.shape[0], (index, self.shape)
            skipped = index * math.prod(self.shape[1:]) * self.dtype.itemsize
            return FileTensor(self.path, self.offset + skipped, self.dtype, self.shape[1:])
        rows, *columns = index if isinstance(index, tuple) else (index,)
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        return self._read(start, stop)[(slice(None), *columns)]

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """As torch.Tensor.narrow; along the first dimension nothing else is read."""
        if dim == 0:
            return self._read(start, start + length)
        return self._read(0, self.shape[0]).narrow(dim, start, length)

    def _read(self, start: int, stop: int) -> torch.Tensor:
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if rows.numel() == 0:
            return rows
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset + start * row_bytes)
                buffer = tensor_bytes(rows)
                while buffer:  # one call reads 2 GiB at most
                    read = file.readinto(buffer)
                    if not read:
                        raise UserError(f"'{self.path}' is truncated: copy or download it again")
                    buffer = buffer[read:]
        except OSError as error:
            raise UserError(f"cannot read '{self.path}': {error.strerror}") from error
        return rows


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
