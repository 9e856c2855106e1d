"""A log is read once, in a bounded memory, and its curves keep what a picture needs."""

import json
import math
import tracemalloc

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.reporting.run_log import MOST_POINTS, Curve, Point, first_and_last, read_log


def curve(values, most=MOST_POINTS):
    made = Curve(most)
    for step, value in enumerate(values, start=1):
        made.add(step, value)
    return made


def test_few_steps_are_points_of_their_own():
    assert curve([3.0, 2.0]).points() == [Point(1, 3.0, 3.0, 3.0), Point(2, 2.0, 2.0, 2.0)]


@pytest.mark.parametrize("steps", [8, 9, 64, 1000])
def test_many_steps_are_joined_and_none_is_lost(steps):
    values = [math.sin(step) for step in range(steps)]
    made = curve(values, most=8)
    points = made.points()
    assert 4 <= len(points) <= 8 and (made.first, made.last) == (1, steps)
    assert [point.step for point in points] == sorted(point.step for point in points)
    assert min(point.least for point in points) == min(values) and max(point.most for point in points) == max(values)
    joined = {}
    for step, value in enumerate(values, start=1):
        joined.setdefault(step // made.width, []).append(value)
    assert [point.value for point in points] == pytest.approx([sum(own) / len(own) for own in joined.values()])


def test_smoothing_keeps_the_ends_and_a_straight_line():
    made = curve([float(step) for step in range(200)])
    assert [p.value for p in made.smoothed(60)] == pytest.approx([p.value for p in made.points()])
    noisy = curve([step % 2 for step in range(200)])
    smooth = [point.value for point in noisy.smoothed(20)]
    assert (smooth[0], smooth[-1]) == (0, 1) and all(0.4 < value < 0.6 for value in smooth[10:-10])
    assert noisy.smoothed(200) == noisy.points()


def log(path, records, rest=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + rest)
    return path


def test_what_a_log_keeps(tmp_path):
    router = {"hu": {"frozen_share": [0.25], "p0": [0.1], "load": [[0.25, 0.75]]}}
    records = [{"step": step, "ntp_loss": 1.0, "lpr_loss": None, "router_summary": {}} for step in range(1, 7)]
    records[1] |= {"router": router, "ntp_loss_per_language": {"hu": 1.5, "en": None}}
    records[2] |= {"router": router, "validation": {"bits_per_byte": {"hu": 1.25}}}
    records[3] |= {"router": router, "ranks": {"memory_gb": {"max": 3.0}}, "ntp_loss": None}
    found = read_log(log(tmp_path / "metrics.jsonl", records, rest='{"step": 7, "ntp'))
    assert found.last == records[-1] and found.router_ends == [records[1], records[3]]
    assert found.validation_ends == [records[2]]
    drawn = {(path, language) for path, its in found.curves.items() for language in its}
    assert drawn == {
        ("ntp_loss", ""), ("ntp_loss_per_language/*", "hu"), ("validation/bits_per_byte/*", "hu"),
        ("ranks/memory_gb/max", ""),
    }  # fmt: skip
    assert [point.step for point in found.curves["ntp_loss"][""].points()] == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": "x"}', '{"step": 2, "ntp_loss": "x"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = log(tmp_path / "metrics.jsonl", [{"step": 1, "ntp_loss": 1.0}], rest=f"{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a step's record; remove the line"):
        read_log(path)


def test_a_log_without_a_step(tmp_path):
    with pytest.raises(UserError, match="no step in it yet"):
        read_log(log(tmp_path / "metrics.jsonl", [], rest='{"step": 1'))


def test_a_long_run_has_a_few_hundred_points():
    assert 150 <= len(curve([1.0] * 50_000).points()) <= MOST_POINTS


def test_a_log_is_never_in_memory(tmp_path):
    records = ({"step": step, "ntp_loss": step % 7 / 7, "text": "x" * 4000} for step in range(1, 3001))
    path = log(tmp_path / "metrics.jsonl", records)
    tracemalloc.start()
    found = read_log(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1_000_000 < path.stat().st_size / 10 and found.last["step"] == 3000


def test_first_and_last_skip_steps_without_router_statistics():
    def record(step, **shares):
        return {"step": step, "router": {language: {"frozen_share": share} for language, share in shares.items()}}

    records = [record(1), record(2, hu=[0.25]), record(3, hu=[0.5]), record(4)]
    assert first_and_last(records) == {"step 2": {"hu": [0.25]}, "step 3": {"hu": [0.5]}}
