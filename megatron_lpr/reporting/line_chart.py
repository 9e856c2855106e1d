"""Curves over the steps of a run as a picture in SVG: a smoothed line, and behind it all that the steps had."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from megatron_lpr.reporting.run_log import Curve, Point
from megatron_lpr.reporting.svg import COLOURS, drawing, escape, number, shortened, tick_label, ticks, titled, width_of

WIDTH, HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 42, 34
_LEGEND_ROW, _MARGIN = 17, 4
_SMOOTHED, _DOTTED = 60, 40  # points that are apart on a smoothed line; up to so many points are marked
_BANDS = 3  # lines that have a band behind them at most
_FULL_LINES = 8  # more of them have fewer points each
_OUTLIERS = 0.03  # of a band, which may be out of sight at either side
_STRIPS = 40  # places where the pointer finds the values
_ROUNDING = 1e-9  # of the values: what lies closer together is all the same
_FINE = 2  # of a pixel, in which curves are drawn


def line_chart(
    title: str, unit: str, curves: Mapping[str, Curve | None], *, log: bool = False, level: float | None = None
) -> str:
    """One line for each name; None: it has none here, and its colour is for no other.

    Args:
        log: a logarithmic axis, where all is above zero.
        level: a value that is drawn where it is in sight.
    """
    lines = {name: curve.smoothed(_SMOOTHED) for name, curve in curves.items() if curve}
    if len(lines) > _FULL_LINES:
        lines = {name: _thinned(points) for name, points in lines.items()}
    kinds = {name: _kind(place) for place, name in enumerate(curves)}
    legend, rows = _legend({name: kinds[name] for name in lines}) if len(curves) > 1 else ("", 0)
    bands = {name: points for name, points in lines.items() if len(points) > _DOTTED and len(lines) <= _BANDS}
    axes = _Axes(lines, bands, [curve for curve in curves.values() if curve], log=log)
    parts = [
        f'<text class="title" x="2" y="15">{escape(shortened(title, WIDTH, 13))}</text>'
        f'<text class="soft" x="2" y="31">{escape(unit)}</text>',
        *axes.grid(),
        *([] if level is None or not axes.low <= level <= axes.high else [axes.level(level)]),
        f'<svg x="{_LEFT}" y="{_TOP}" width="{axes.width}" height="{axes.height}" '
        f'viewBox="0 0 {axes.width * _FINE} {axes.height * _FINE}">',  # cuts off what lies outside
        f'<g class="fine">{"".join(_drawn(axes, lines, bands, kinds))}</g></svg>',
        *_strips(axes, lines),
        legend,
    ]
    return drawing(title, WIDTH, HEIGHT + rows * _LEGEND_ROW, "".join(parts))


def _thinned(points: Sequence[Point]) -> list[Point]:
    """As many as are apart on a smoothed line, with the last."""
    return [*points[: -1 : max(len(points) // _SMOOTHED, 1)], points[-1]]


class _Axes:
    """Where a step and a value lie in the picture."""

    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def __init__(
        self,
        lines: Mapping[str, Sequence[Point]],
        bands: Mapping[str, Sequence[Point]],
        curves: Sequence[Curve],
        *,
        log: bool,
    ) -> None:
        values = [point.value for points in lines.values() for point in points]
        for points in bands.values():
            out = int(_OUTLIERS * len(points))
            values += [sorted(point.least for point in points)[out], sorted(point.most for point in points)[-1 - out]]
        self.log = log and min(values) > 0
        low, high = min(values), max(values)
        if self.log:
            low, high = math.log10(low), math.log10(high)
        # means of equal numbers differ by their rounding, which is no curve
        is_flat = high - low <= _ROUNDING * (1.0 if self.log else max(abs(low), abs(high)))
        flat_margin = 0.3 if self.log else 0.05 * abs(high) or 1.0
        margin = flat_margin if is_flat else 0.06 * (high - low)
        self.low, self.high = low - margin, high + margin
        if not self.log and low >= 0:
            self.low = max(self.low, 0.0)
        self.first, self.last = min(curve.first for curve in curves), max(curve.last for curve in curves)

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return _MARGIN + share * (self.width - 2 * _MARGIN)

    def y(self, value: float) -> float:
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        y = (self.high - value) / (self.high - self.low) * self.height
        return min(max(y, -self.height), 2 * self.height)  # far outside it is cut off anyway

    def grid(self) -> Iterator[str]:
        for value, label in self._values():
            y = _TOP + round((self.high - value) / (self.high - self.low) * self.height)
            yield f'<path class="grid" d="M{_LEFT} {y}h{self.width}"/>'
            yield f'<text class="soft end" x="{_LEFT - 6}" y="{y + 4}">{label}</text>'
        bottom = _TOP + self.height
        steps = ticks(self.first, self.last, 6) if self.last > self.first else [self.first]
        steps = [step for step in steps if step == int(step)]
        apart = steps[1] - steps[0] if len(steps) > 1 else 1
        for step in steps:
            x = _LEFT + round(self.x(step))
            label = tick_label(step, apart, self.last)
            yield f'<path class="grid" d="M{x} {bottom}v4"/>'
            yield f'<text class="soft mid" x="{x}" y="{bottom + 16}">{label}</text>'
        yield f'<text class="soft end" x="{WIDTH - _RIGHT}" y="{bottom + 30}">optimizer step</text>'

    def _values(self) -> list[tuple[float, str]]:
        if self.log:
            decades = range(math.ceil(self.low), math.floor(self.high) + 1)
            if len(decades) >= 2:
                every = len(decades) // 6 + 1
                return [(value, f"{10.0**value:g}") for value in decades[::every]]
            return [(value, f"{10**value:.2g}") for value in ticks(self.low, self.high, 4)]
        values = ticks(self.low, self.high)
        step = values[1] - values[0] if len(values) > 1 else abs(self.high - self.low)
        return [(value, tick_label(value, step, max(map(abs, values)))) for value in values]

    def level(self, value: float) -> str:
        return f'<path class="level" d="M{_LEFT} {_TOP + round(self.y(value))}h{self.width}"/>'


def _kind(place: int) -> str:
    return f"s{place % COLOURS}" + (" dash" if place // COLOURS % 2 else "")


def _drawn(
    axes: _Axes,
    lines: Mapping[str, Sequence[Point]],
    bands: Mapping[str, Sequence[Point]],
    kinds: Mapping[str, str],
) -> Iterator[str]:
    for name, points in bands.items():
        band = _path(axes, points, lambda p: p.most) + _path(axes, points[::-1], lambda p: p.least, "L") + "z"
        yield f'<path class="band {kinds[name].split()[0]}" d="{band}"/>'
    for name, points in lines.items():
        line = _path(axes, points, lambda p: p.value)
        yield f'<path class="line {kinds[name]}" d="{line}"><title>{escape(name)}</title></path>'
        if len(points) <= _DOTTED:
            dots = "".join(f"M{_FINE * axes.x(p.step):.0f} {_FINE * axes.y(p.value):.0f}h0" for p in points)
            yield f'<path class="line {kinds[name].split()[0]} dots" d="{dots}"/>'


def _path(axes: _Axes, points: Sequence[Point], value: Callable[[Point], float], begin: str = "M") -> str:
    """Relative moves, which are short."""
    places = [(round(_FINE * axes.x(point.step)), round(_FINE * axes.y(value(point)))) for point in points]
    (x, y), moves = places[0], []
    for (x0, y0), (x1, y1) in zip(places, places[1:], strict=False):
        moves.append(f"{x1 - x0} {y1 - y0}".replace(" -", "-"))
    return f"{begin}{x} {y}" + (f"l{' '.join(moves)}" if moves else "")


def _strips(axes: _Axes, lines: Mapping[str, Sequence[Point]]) -> Iterator[str]:
    """What the pointer finds: the values of all lines at a place."""
    width = axes.width / _STRIPS
    found: dict[int, dict[str, Point]] = {}
    for name, points in lines.items():
        for point in points:
            found.setdefault(min(int(axes.x(point.step) / width), _STRIPS - 1), {})[name] = point
    for place, of_lines in sorted(found.items()):
        told = [f"step {max(point.step for point in of_lines.values()):,.0f}"]
        told += [f"{shortened(name, 400)}: {number(point.value)}" for name, point in of_lines.items()]
        yield (
            f'<rect class="over" x="{_LEFT + place * width:.1f}" y="{_TOP}" width="{width:.1f}" '
            f'height="{axes.height}"><title>{escape(chr(10).join(told))}</title></rect>'
        )


def _legend(kinds: Mapping[str, str]) -> tuple[str, int]:
    """Drawn below the axes, in as many rows as it takes."""
    parts, x, row = [], 2.0, 0
    for name, kind in kinds.items():
        short = shortened(name, WIDTH - 40)
        width = 22 + width_of(short) + 12
        if x > 2 and x + width > WIDTH:
            x, row = 2.0, row + 1
        y = HEIGHT + row * _LEGEND_ROW + 8
        parts.append(
            f'<path class="line {kind}" d="M{x:.0f} {y}h16"/>'
            f'<text x="{x + 22:.0f}" y="{y + 4}">{titled(name, WIDTH - 40)}</text>'
        )
        x += width
    return "".join(parts), row + 1
