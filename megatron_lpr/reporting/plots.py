"""Plots of a run: loss curves, and where each language's tokens go before and after review."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_lpr.errors import UserError
from megatron_lpr.reporting.run_log import RunLog

LOSSES = {
    "ntp_loss": ("Next-token prediction", "NTP loss (nats per token)"),
    "balance_loss": ("Load balance (1: every expert gets the same)", "balance loss (no unit)"),
    "lpr_loss": ("Language Priors Routing", "LPR loss, mean of -ln p$_0$ (nats)"),
}

COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F")
"""Those of Okabe and Ito, which colour-blind readers tell apart."""
MARKERS = "osD^v"
_MOST_INCHES = 30.0  # of a side: what 2,000 texts would take at the size of a few is more than any memory
_MOST_NUMBERS = 2000
_LABEL_INCHES = 0.16  # that one label takes


def plot_losses(runs: Mapping[str, RunLog], path: str | Path) -> None:
    """Write a PNG of the loss curves, one panel per loss that any run has, one line per run.

    Of a long run a point is the mean of neighbouring steps; the pale band goes from their least to their most.

    Args:
        runs: logs under the name of each run.
        path: the PNG.

    Raises:
        UserError: no losses at all.
    """
    panels = [key for key in LOSSES if any(run.curves[key] for run in runs.values())]
    if not panels:
        raise UserError(f"no steps to plot in {path}: the runs {', '.join(runs) or '(none)'} logged nothing")
    figure = Figure(figsize=(1 + 4.6 * len(panels), 3.8), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, run) in enumerate(runs.items()):
            if curve := run.curves[key].get(""):
                steps, means, least, most = zip(*curve.points(), strict=True)
                axes.plot(steps, means, marker=".", label=name, color=f"C{number}")
                if curve.width > 1:
                    axes.fill_between(steps, least, most, color=f"C{number}", alpha=0.2, linewidth=0)
        title, unit = LOSSES[key]
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def plot_frozen_share(
    shares: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path, *, max_share: float
) -> None:
    """Write a PNG of heatmaps, one per moment: how much of the routing goes to the frozen experts.

    Args:
        shares: per moment (as "before review"), per language or held-out corpus: the share of its routing
            slots that frozen experts get in each MoE layer, 0..1. See `RunLog.frozen_shares`.
        path: the PNG.
        max_share: the largest possible share, top of the colour scale: min(frozen experts, topk) / topk, for
            a token takes an expert once.

    Raises:
        UserError: no shares at all.
    """
    if not any(shares.values()):
        raise UserError(f"no router statistics to plot in {path}: the run logged none")
    columns = list(dict.fromkeys(column for moment in shares.values() for column in moment))
    layers = max(len(share) for moment in shares.values() for share in moment.values())
    width, height = min(0.9 * len(columns) * len(shares), _MOST_INCHES), min(0.22 * layers, _MOST_INCHES)
    figure = Figure(figsize=(max(2.2 + width, 5), max(1.8 + height, 4)), layout="constrained")
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for axes, (moment, share_of) in zip(panels, shares.items(), strict=True):
        share_LC = np.full((layers, len(columns)), np.nan)
        for index, column in enumerate(columns):
            if column in share_of:
                share_LC[: len(share_of[column]), index] = share_of[column]
        image = _heatmap(axes, share_LC, columns, max_share=max_share, inches=width / len(shares))
        axes.set_title(moment)
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(panels), format=PercentFormatter(xmax=1, decimals=0))
    bar.set_label(f"share of slots (at most {100 * max_share:.0f}%)")
    figure.suptitle("Routing slots that go to frozen experts")
    save_figure(figure, path)


def plot_routing(shares: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path, *, max_share: float) -> None:
    """Write a PNG that says where each language goes: a row per held-out text, a point per model.

    Args:
        shares: per model, per held-out text: as `plot_frozen_share`. Drawn is the mean over the layers. A model without
            experts has none, and keeps its colour for other pictures.
        path: the PNG.
        max_share: as `plot_frozen_share`; the right end.

    Raises:
        UserError: no shares at all.
    """
    if not any(shares.values()):
        raise UserError(f"no router statistics to plot in {path}: the models have none")
    rows = list(dict.fromkeys(text for model in shares.values() for text in model))
    height = min(0.32 * len(rows), _MOST_INCHES)
    figure = Figure(figsize=(8, 1.6 + height), layout="constrained")
    axes, place_of = figure.subplots(), {text: place for place, text in enumerate(rows)}
    for number, (model, share_of) in enumerate(shares.items()):
        if share_of:
            means, places = [np.mean(share) for share in share_of.values()], [place_of[text] for text in share_of]
            marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
            axes.plot(means, places, marker, color=colour, label=model, markersize=8, markeredgecolor="w")
    every = _every(len(rows), height)
    axes.set_yticks(range(0, len(rows), every), rows[::every])
    axes.set(xlabel=f"share of routing slots that go to frozen experts, mean over layers (at most {max_share:.0%})")
    axes.set_xlim(0, 1.02 * max_share)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.axvline(max_share, color="0.6", linewidth=1, zorder=0)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4)
    save_figure(figure, path)


def _every(names: int, inches: float) -> int:
    """One of so many names is written, where there is no room for all."""
    return math.ceil(names * _LABEL_INCHES / inches)


def _heatmap(axes: Axes, share_LC: np.ndarray, columns: Sequence[str], *, max_share: float, inches: float) -> AxesImage:
    """share_LC: layers x columns, NaN where a language had no tokens. inches: the width."""
    axes.set_facecolor("0.85")
    image = axes.imshow(share_LC, vmin=0, vmax=max_share, cmap="viridis", aspect="auto", origin="lower")
    slanted: dict[str, Any] = (
        {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        if max(map(len, columns)) > 8 or inches < 0.6 * len(columns)
        else {}
    )
    every = _every(len(columns), inches)
    axes.set_xticks(range(0, len(columns), every), columns[::every], **slanted)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(share_LC) <= 64 and share_LC.size <= _MOST_NUMBERS:
        for (layer, column), share in np.ndenumerate(share_LC):
            dark = share < 0.5 * max_share
            text = "" if np.isnan(share) else f"{100 * share:.0f}"
            axes.text(column, layer, text, ha="center", va="center", fontsize=7, color="w" if dark else "k")
    return image


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=130)
