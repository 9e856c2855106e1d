"""Where the points and names of retention against gain stand, read back from the figure."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from megatron_lpr.errors import UserError
from megatron_lpr.reporting.gain_plot import Arm, plot_retention_against_gain

REPLAYED, NEVER = "replayed (en)", "never replayed (es, fr)"


def arm(name, gain, en, es, fr, curve=None):
    return Arm(name=name, gain=gain, kept={REPLAYED: {"en": en}, NEVER: {"es": es, "fr": fr}}, curve=curve)


QUICKSTART = [
    arm("base", 0, 100, 100, 100),
    arm("dense, all trained", 28.3, 91, 61, 57),
    arm("stage 1", 26.5, 99, 91, 87),
    arm("review without LPR", 24.7, 101, 91, 87.5),
    arm("review", 24.4, 101, 97, 93),
]
CURVE = [arm(f"gamma {gamma}", 26 - gamma, 101, 96 + gamma, 95 + gamma, "review") for gamma in (0.1, 0.2, 0.3, 0.5, 2)]


def names(axes):
    return {text.get_text(): text for text in axes.texts if text.get_text()}


def test_a_point_per_arm_and_series_and_a_dot_per_text(tmp_path, figures):
    plot_retention_against_gain(QUICKSTART, tmp_path / "plots" / "gain.png")
    axes = figures[0].axes[0]
    drawn = [[tuple(xy) for xy in points.get_offsets().tolist()] for points in axes.collections]
    for one in QUICKSTART:
        en, es, fr = one.kept[REPLAYED]["en"], one.kept[NEVER]["es"], one.kept[NEVER]["fr"]
        x = one.gain
        assert [(x, en)] in drawn and [(x, es), (x, fr)] in drawn and [(x, (es + fr) / 2)] in drawn
    assert len(drawn) == 4 * len(QUICKSTART)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [REPLAYED, NEVER]
    assert names(axes).keys() == {one.name for one in QUICKSTART}
    picture = imread(tmp_path / "plots" / "gain.png")
    assert picture.shape[0] > 500 and picture[0, 0].tolist() == [1, 1, 1, 1]  # white, whatever it is shown on


@pytest.mark.parametrize("arms", [QUICKSTART, QUICKSTART + CURVE], ids=["quickstart", "with a curve of gamma"])
def test_names_are_apart_from_each_other_and_from_points(tmp_path, figures, arms):
    plot_retention_against_gain(arms, tmp_path / "gain.png")
    figure, axes = figures[0], figures[0].axes[0]
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    boxes = {name: text.get_window_extent() for name, text in names(axes).items()}
    assert [pair for pair in itertools.combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])] == []
    points = axes.transData.transform([(one.gain, one.mean(series)) for one in arms for series in one.kept])
    assert [name for name, box in boxes.items() for x, y in points if box.contains(x, y)] == []
    for name, box in boxes.items():
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1), name


def test_arms_of_a_curve_are_joined_in_one_colour(tmp_path, figures):
    plot_retention_against_gain([*QUICKSTART[:2], *CURVE], tmp_path / "gain.png")
    axes = figures[0].axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(CURVE)]
    assert [list(line.get_ydata()) for line in lines] == [[one.mean(s) for one in CURVE] for s in (REPLAYED, NEVER)]
    assert {names(axes)[one.name].get_color() for one in CURVE} == {lines[0].get_color()}


def test_nothing_to_plot_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model was scored on text of an original language"):
        plot_retention_against_gain([], tmp_path / "gain.png")
