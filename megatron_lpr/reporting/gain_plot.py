"""What models learned against what they kept: a point per model, from plain numbers."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from megatron_lpr.errors import UserError
from megatron_lpr.reporting.plots import COLOURS, MARKERS, save_figure


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model in the picture.

    gain: percent fewer bits per byte than the base has on expanded text. kept: per series of original languages (as
    "replayed"), retention in percent of each held-out text. curve: arms with the same one share a colour, and a line
    joins them.
    """

    name: str
    gain: float
    kept: Mapping[str, Mapping[str, float]]
    curve: str | None = None

    def mean(self, series: str) -> float:
        """Retention of a series: the mean over its texts."""
        return float(np.mean(list(self.kept[series].values())))


def plot_retention_against_gain(arms: Sequence[Arm], path: str | Path) -> None:
    """Write a PNG with a labelled point per arm and series: the mean over its texts, each of which is a dot.

    Right is more learned, up is more kept; the line at 100% is the base.

    Raises:
        UserError: no arms, or none with a series.
    """
    series = list(dict.fromkeys(name for arm in arms for name in arm.kept))
    if not series:
        raise UserError(f"nothing to plot in {path}: no model was scored on text of an original language")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100, color="0.6", linewidth=1, zorder=0)
    groups = list(dict.fromkeys(arm.curve or arm.name for arm in arms))
    colours = {group: COLOURS[number % len(COLOURS)] for number, group in enumerate(groups)}
    for arm in arms:
        _draw(axes, arm, series, colours[arm.curve or arm.name])
    for group, name in itertools.product(groups, series):
        curve = [(arm.gain, arm.mean(name)) for arm in arms if arm.curve == group and name in arm.kept]
        axes.plot(*np.reshape(curve, (-1, 2)).T, color=colours[group], linewidth=1, alpha=0.6, zorder=1)
    axes.set(
        xlabel="gain: fewer bits per byte on expanded text, mean over texts",
        ylabel="retention: base bits / model bits on original text",
    )
    axes.margins(x=0.1, y=0.08)
    axes.grid(alpha=0.3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter())
    samples = [_sample(number, name) for number, name in enumerate(series)]
    figure.legend(handles=samples, loc="outside upper center", ncols=2)
    _label(axes, arms, colours)
    save_figure(figure, path)


def _draw(axes: Axes, arm: Arm, series: Sequence[str], colour: str) -> None:
    """One arm: a marker per series, a dot per text, and a thin line that holds its series together."""
    means = [arm.mean(name) for name in series if name in arm.kept]
    axes.plot([arm.gain] * len(means), means, color=colour, linewidth=1, alpha=0.3, zorder=1)
    for number, name in enumerate(series):
        if name in arm.kept:
            dots = list(arm.kept[name].values())
            axes.scatter([arm.gain] * len(dots), dots, s=9, color=colour, alpha=0.4, linewidth=0, zorder=2)
            marker = MARKERS[number % len(MARKERS)]
            axes.scatter([arm.gain], [arm.mean(name)], s=64, color=colour, marker=marker, edgecolor="w", zorder=3)


def _sample(number: int, name: str) -> Line2D:
    """What a series looks like, for the legend."""
    return Line2D([], [], linestyle="", marker=MARKERS[number % len(MARKERS)], color="0.4", markersize=8, label=name)


def _label(axes: Axes, arms: Sequence[Arm], colours: Mapping[str, str]) -> None:
    """The name of each arm beside its lowest marker, or farther away at the end of a line, where nothing else is."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure)  # measures text
    figure.draw_without_rendering()  # puts the axes where they will be
    means = axes.transData.transform([(arm.gain, arm.mean(name)) for arm in arms for name in arm.kept])
    dots = axes.transData.transform(
        [(arm.gain, y) for arm in arms for text in arm.kept.values() for y in text.values()]
    )
    point = figure.dpi / 72
    taken = [Bbox([at - half * point, at + half * point]) for half, them in ((5, means), (2, dots)) for at in them]
    for arm in arms:
        if arm.kept:
            lowest = arm.gain, min(map(arm.mean, arm.kept))
            taken.append(_write(axes, arm.name, lowest, colours[arm.curve or arm.name], taken))


def _write(axes: Axes, text: str, at: tuple[float, float], colour: str, taken: Sequence[Bbox]) -> Bbox:
    """Write `text` at the first place near `at` that overlaps nothing, or the least; returns where it is."""
    label = axes.annotate(
        text,
        at,
        xytext=(0, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=colour,
        annotation_clip=False,
    )
    label.set_path_effects([withStroke(linewidth=3, foreground="w")])
    label.set_in_layout(False)  # or the axes would move again
    here = label.get_window_extent()
    point = label.get_figure().dpi / 72  # type: ignore[union-attr]

    def box(place: tuple[float, float, float]) -> Bbox:
        right, up, side = place
        return here.translated(right * point - side * here.width, up * point)

    def overlap(place: tuple[float, float, float]) -> int:
        shared = [Bbox.intersection(box(place), other) for other in taken]
        inside = Bbox.intersection(box(place), axes.bbox)
        outside = _area(here) - (_area(inside) if inside else 0)
        return round(sum(_area(both) for both in shared if both) + outside)

    best = min(_places(), key=overlap)  # the first of the least
    right, up, side = best
    label.set_position((right - side * here.width / point, up))
    if abs(up) > 0:
        line = {"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        axes.annotate("", at, xytext=(right, up), textcoords="offset points", arrowprops=line).set_in_layout(False)
    return box(best)


def _area(box: Bbox) -> float:
    return abs(box.width * box.height)


def _places() -> Iterator[tuple[float, float, float]]:
    """Where a label may stand, the nearest first: points to the right and up, and its point there (0: its left end)."""
    yield 8, 0, 0
    yield -8, 0, 1
    for far in range(12, 150, 6):
        for right, up in ((1, 0.7), (-1, 0.7), (1, -0.7), (-1, -0.7)):
            yield far * right, far * up, 0 if right > 0 else 1
