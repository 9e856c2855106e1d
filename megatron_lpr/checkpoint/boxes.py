"""A range of the numbers of a tensor, in the order in which they lie in memory, as boxes of the tensor."""

import math
from collections.abc import Iterator

from megatron_lpr.files.file_tensor import Shape


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Offsets and sizes of the boxes that are the numbers [start, stop) of a row-major tensor, in their order."""
    if len(shape) == 1:
        if start < stop:
            yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # of the rows that are whole
    if start % row:
        yield from _in_row(shape, first - 1, start, min(stop, first * row))
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if stop % row and last >= first:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    before = row * math.prod(shape[1:])
    for offsets, sizes in boxes(shape[1:], start - before, stop - before):
        yield (row, *offsets), (1, *sizes)
