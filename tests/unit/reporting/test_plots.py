"""What the plots draw, read back from the figures and from the files."""

import json
import tracemalloc

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_lpr.errors import UserError
from megatron_lpr.reporting import plots as routing_plots
from megatron_lpr.reporting.plots import plot_frozen_share, plot_losses, plot_routing
from megatron_lpr.reporting.run_log import MOST_POINTS, RunLog, read_log


def record(step, ntp, balance=None, lpr=None, **shares):
    router = {
        language: {"frozen_share": share, "p0": share, "load": [[0.5, 0.5]]} for language, share in shares.items()
    }
    return {"step": step, "ntp_loss": ntp, "balance_loss": balance, "lpr_loss": lpr, "router": router}


@pytest.fixture
def log(tmp_path):
    """The log of a run that has made these steps."""

    def of(*records):
        with (tmp_path / "metrics.jsonl").open("w") as file:
            file.writelines(json.dumps(its) + "\n" for its in records)
        return read_log(tmp_path / "metrics.jsonl")

    return of


def test_losses_have_a_panel_each_and_a_line_per_run(log, tmp_path, figures):
    runs = {
        "stage 1": log(record(1, 3.0, balance=1.25), record(2, 2.0, balance=1.125)),
        "stage 2": log(record(1, 1.5, lpr=0.75), record(2, 1.25, lpr=0.5), record(3, 1.0, lpr=0.25)),
    }
    path = tmp_path / "plots" / "loss.png"
    plot_losses(runs, path)
    drawn = {
        axes.get_ylabel().split()[0]: {
            line.get_label(): list(zip(*(values.tolist() for values in line.get_data()), strict=True))
            for line in axes.get_lines()
        }
        for axes in figures[0].axes
    }
    assert drawn == {
        "NTP": {"stage 1": [(1, 3.0), (2, 2.0)], "stage 2": [(1, 1.5), (2, 1.25), (3, 1.0)]},
        "balance": {"stage 1": [(1, 1.25), (2, 1.125)]},
        "LPR": {"stage 2": [(1, 0.75), (2, 0.5), (3, 0.25)]},
    }
    assert imread(path).shape[0] > 300


def test_a_long_run_takes_no_more_than_a_short_one(tmp_path, figures):
    """200,000 steps are a few hundred points, with a band of all that they had."""
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"step": {step}, "ntp_loss": {step % 7}}}\n' for step in range(1, 200_001))
    tracemalloc.start()
    log = read_log(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000 < path.stat().st_size / 5
    tracemalloc.stop()
    plot_losses({"long": log}, tmp_path / "loss.png")
    axes = figures[0].axes[0]
    steps, means = axes.lines[0].get_data()
    assert 150 <= len(steps) <= MOST_POINTS and steps[0] < 1000 and steps[-1] > 199_000
    assert means == pytest.approx(np.full(len(steps), 3.0), abs=0.05)
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [0, 6]
    assert (tmp_path / "loss.png").stat().st_size < 100_000


def test_loss_panels_that_no_run_has_are_left_out(log, tmp_path, figures):
    plot_losses({"dense": log(record(1, 3.0))}, tmp_path / "loss.png")
    assert not figures[0].axes[0].collections
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["NTP loss (nats per token)"]


def test_heatmaps_hold_layers_by_languages(log, tmp_path, figures):
    records = [
        record(1, 1.0, hu=[0.25, 0.375]),
        record(2, 1.0, hu=[0.0, 0.0], en=[0.0, 0.0]),
        record(3, 1.0, hu=[0.125, 0.25], en=[0.5, 0.5]),
    ]
    path = tmp_path / "heat.png"
    plot_frozen_share(log(*records).frozen_shares(), path, max_share=0.5)
    before, after, bar = figures[0].axes
    np.testing.assert_array_equal(before.images[0].get_array().filled(-1), [[0.25, -1], [0.375, -1]])
    np.testing.assert_array_equal(after.images[0].get_array(), [[0.125, 0.5], [0.25, 0.5]])
    assert [before.get_title(), after.get_title()] == ["step 1", "step 3"]
    assert [label.get_text() for label in after.get_xticklabels()] == ["hu", "en"]
    assert [axes.images[0].get_clim() for axes in (before, after)] == [(0, 0.5), (0, 0.5)]
    assert "50%" in bar.get_ylabel()
    assert [text.get_text() for text in after.texts] == ["12", "50", "25", "50"]
    assert imread(path).shape[0] > 300


def test_routing_has_a_row_per_text_and_a_point_per_model(tmp_path, figures):
    shares = {"base": {}, "stage 1": {"hu": [0.0, 0.25], "en": [0.25, 0.5]}, "review": {"en": [0.5, 0.5]}}
    plot_routing(shares, tmp_path / "routing.png", max_share=0.5)
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["hu", "en"] and axes.yaxis_inverted()
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert "base" not in drawn and axes.lines[0].get_color() == routing_plots.COLOURS[1]
    assert drawn["stage 1"] == [[0.125, 0], [0.375, 1]] and drawn["review"] == [[0.5, 1]]
    assert imread(tmp_path / "routing.png").shape[1] > 1000


def test_nothing_to_plot_is_refused(tmp_path):
    with pytest.raises(UserError, match="no steps to plot"):
        plot_losses({"stage 1": RunLog()}, tmp_path / "loss.png")
    with pytest.raises(UserError, match="no router statistics"):
        plot_frozen_share(RunLog().frozen_shares(), tmp_path / "heat.png", max_share=0.5)
    with pytest.raises(UserError, match="the models have none"):
        plot_routing({"base": {}}, tmp_path / "routing.png", max_share=0.5)


def test_pictures_of_thousands_of_texts_are_no_larger_than_those_of_hundreds(tmp_path, figures):
    def drawn(texts):
        figures.clear()
        shares = {model: {f"text {number}": [0.5] * 8 for number in range(texts)} for model in ("one", "two")}
        plot_frozen_share(shares, tmp_path / "a.png", max_share=0.5)
        plot_routing(shares, tmp_path / "b.png", max_share=0.5)
        labels = [len(axes.get_xticks()) + len(axes.get_yticks()) for figure in figures for axes in figure.axes]
        numbers = sum(len(axes.texts) for figure in figures for axes in figure.axes)
        return [tuple(figure.get_size_inches()) for figure in figures], sum(labels), numbers

    few, many, more = (drawn(texts) for texts in (10, 400, 2000))
    assert few[2] == 2 * 10 * 8 and many[2] == more[2] == 0
    assert many[0] == more[0] != few[0] and more[1] < 1.3 * many[1]
