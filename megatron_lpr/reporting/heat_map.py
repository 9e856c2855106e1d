"""Shares as a picture in SVG: rows of coloured cells, small however many there are."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence

from megatron_lpr.reporting.svg import drawing, escape, titled, width_of

_COLOURS = "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725".split()  # viridis, by tenths
_LEVELS = 40
_AXIS = "layer"
_MOST_WIDTH, _ROW, _TOP = 940, 18, 26
_LARGEST_CELL, _NUMBERED_CELL, _MOST_NUMBERS = 34, 22, 1000
_SCALE = 120
_MOST_TOLD = 40  # rows that the pointer finds at a place
_UNNUMBERED_ROWS = 16  # above it rows are lower


def heat_map(title: str, rows: Mapping[str, Sequence[float | None]], *, top: float, columns: Sequence[int]) -> str:
    """One row for each name, one cell for each layer; None: no number there.

    Args:
        top: the value of the brightest colour; shares are shown in percent.
        columns: numbers of the layers.
    """
    left = min(max(width_of(name) for name in (*rows, _AXIS)) + 12, 200)
    cell = max(3, min(_LARGEST_CELL, math.floor((_MOST_WIDTH - left) / len(columns))))
    row = _ROW if len(rows) <= _UNNUMBERED_ROWS else 10
    beside = width_of(title, 13) + 30  # the title
    width = max(left + cell * len(columns) + 8, beside + _SCALE + 80)
    is_numbered = cell >= _NUMBERED_CELL and row == _ROW and len(rows) * len(columns) <= _MOST_NUMBERS
    bottom = _TOP + row * len(rows)
    parts = [
        f'<text class="title" x="2" y="15">{escape(title)}</text>',
        *_names(rows, left, row),
        *_cells(rows, left, row, cell, top),
        *_columns(columns, left, bottom, cell),
        *(_numbers(rows, left, row, cell, top) if is_numbered else _strips(rows, columns, left, bottom, cell)),
        *_scale(top, beside),
    ]
    return drawing(title, math.ceil(width), bottom + 20, "".join(parts))


def _names(rows: Mapping[str, object], left: float, height: int) -> Iterator[str]:
    for place, name in enumerate(rows):
        y = _TOP + place * height + height / 2 + 4
        label = titled(name, left - 8)
        yield f'<text class="end" x="{left - 6:.0f}" y="{y:g}">{label}</text>'


def _cells(
    rows: Mapping[str, Sequence[float | None]], left: float, height: int, cell: int, top: float
) -> Iterator[str]:
    """A path for each colour, with a line for each stretch of cells."""
    paths: dict[int | None, list[str]] = {}
    for place, values in enumerate(rows.values()):
        y = _TOP + place * height + height // 2
        levels = [_level(value, top) for value in values]
        first = 0
        for end in range(1, len(levels) + 1):
            if end == len(levels) or levels[end] != levels[first]:
                line = f"M{left + first * cell:.0f} {y}h{(end - first) * cell}"
                paths.setdefault(levels[first], []).append(line)
                first = end
    for level, lines in paths.items():
        colour = 'class="cells none"' if level is None else f'class="cells" stroke="{_colour(level / _LEVELS)}"'
        yield f'<path {colour} stroke-width="{height - 1}" d="{"".join(lines)}"/>'


def _numbers(
    rows: Mapping[str, Sequence[float | None]], left: float, height: int, cell: int, top: float
) -> Iterator[str]:
    """In percent, where there is room and they can still be read one by one."""
    for place, values in enumerate(rows.values()):
        kinds: dict[str, list[str]] = {"on-dark": [], "on-light": []}
        for column, value in enumerate(values):
            if value is not None:
                x = left + (column + 0.5) * cell
                kind = "on-dark" if value < 0.55 * top else "on-light"
                kinds[kind].append(f'<text x="{x:.0f}">{100 * value:.0f}</text>')
        y = _TOP + place * height + height // 2 + 3
        for kind, texts in kinds.items():
            if texts:
                yield f'<g class="mid {kind}" transform="translate(0 {y})">{"".join(texts)}</g>'


def _columns(columns: Sequence[int], left: float, bottom: int, cell: int) -> Iterator[str]:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * cell >= width_of(str(columns[-1])) + 6)
    for place, column in enumerate(columns):
        if place % every == 0:
            x = left + (place + 0.5) * cell
            yield f'<text class="soft mid" x="{x:.0f}" y="{bottom + 13}">{column}</text>'
    yield f'<text class="soft end" x="{left - 6:.0f}" y="{bottom + 13}">{_AXIS}</text>'


def _strips(
    rows: Mapping[str, Sequence[float | None]], columns: Sequence[int], left: float, bottom: int, cell: int
) -> Iterator[str]:
    """What the pointer finds in a column: of many rows those that have most there, for nobody reads hundreds."""
    for place, column in enumerate(columns):
        shares = [(name, values[place] if place < len(values) else None) for name, values in rows.items()]
        if len(shares) > _MOST_TOLD:
            shares = heapq.nlargest(_MOST_TOLD, shares, key=lambda share: -1.0 if share[1] is None else share[1])
        told = [f"{_AXIS} {column}", *(f"{name}: {100 * share:.1f}%" for name, share in shares if share is not None)]
        over = f'<rect class="over" x="{left + place * cell:.0f}" y="{_TOP}" width="{cell}" height="{bottom - _TOP}">'
        yield f"{over}<title>{escape(chr(10).join(told))}</title></rect>"


def _scale(top: float, beside: float) -> Iterator[str]:
    """The colours, to the right of the title."""
    x, piece = beside + 24, _SCALE // 24
    yield f'<text class="soft end" x="{x - 5:.0f}" y="15">0%</text>'
    for place in range(24):
        colour = _colour(place / 23)
        yield f'<path class="cells" stroke="{colour}" stroke-width="8" d="M{x + place * piece:.0f} 11h{piece}"/>'
    yield f'<text class="soft" x="{x + _SCALE + 5:.0f}" y="15">{100 * top:.3g}%</text>'


def _level(value: float | None, top: float) -> int | None:
    return None if value is None else round(_LEVELS * min(max(value / top, 0.0), 1.0))


def _colour(share: float) -> str:
    place = share * (len(_COLOURS) - 1)
    lower, part = min(int(place), len(_COLOURS) - 2), place - min(int(place), len(_COLOURS) - 2)
    mixed = (
        round(int(_COLOURS[lower][i : i + 2], 16) * (1 - part) + int(_COLOURS[lower + 1][i : i + 2], 16) * part)
        for i in (0, 2, 4)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
