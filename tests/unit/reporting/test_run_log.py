"""A log is read once, in a bounded memory, and its curves keep what a picture needs."""

import json
import math
import tracemalloc

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.reporting import run_log, sound_record
from megatron_lpr.reporting.run_log import MOST_POINTS, Curve, Point, read_log


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


VALIDATION = {"validation": {"bits_per_byte": {"hu": 1.25}}}


def test_what_a_log_keeps(tmp_path):
    router = {"hu": {"frozen_share": [0.25], "p0": [0.1], "load": [[0.25, 0.75]]}}
    records = [{"step": step, "ntp_loss": 1.0, "lpr_loss": None, "router_summary": {}} for step in range(1, 7)]
    records[1] |= {"router": router, "ntp_loss_per_language": {"hu": 1.5, "en": None}}
    records[2] |= {"router": router} | VALIDATION
    fullest, slowest = {"max": 3.0, "rank": 0, "host": "n"}, {"median": 1.0, "max": 2.0, "rank": 1, "host": "n"}
    ranks = {"memory_gb": fullest, "compute_seconds": slowest}
    records[3] |= {"router": router, "ranks": ranks, "ntp_loss": None}
    found = read_log(log(tmp_path / "metrics.jsonl", records, rest='{"step": 7, "ntp'))
    assert found.last == {"step": 6, "ntp_loss": 1.0}
    assert [end["step"] for end in found.router_ends] == [2, 4]
    for end in found.router_ends:
        assert end["router"]["hu"] | {"load": [list(load) for load in end["router"]["hu"]["load"]]} == router["hu"]
    assert found.validation_ends == [{"step": 3, "ntp_loss": 1.0, **VALIDATION}]
    drawn = {(path, language) for path, its in found.curves.items() for language in its}
    assert drawn == {
        ("ntp_loss", ""), ("ntp_loss_per_language/*", "hu"), ("validation/bits_per_byte/*", "hu"),
        ("ranks/memory_gb/max", ""),
    }  # fmt: skip
    assert [point.step for point in found.curves["ntp_loss"][""].points()] == [1, 2, 3, 5, 6]


def test_damaged_lines_are_left_out_and_told(tmp_path, capsys):
    path = log(
        tmp_path / "metrics.jsonl", [{"step": 1, "ntp_loss": 1.0}], rest='{\n\n{"step": 2, "ntp_loss": 3}\n[]\n{"st'
    )
    found = read_log(path)
    assert [point.value for point in found.curves["ntp_loss"][""].points()] == [1.0, 3]
    said = "lines left out: 3, no steps' records, from line 2 on; the last line left out, which is not finished"
    assert found.notes == said and capsys.readouterr().err == f"warning: metrics {path}: {said}\n"


def test_steps_that_go_back_are_told(tmp_path):
    """Two runs in one file, or one that was started again beside its own log."""
    records = [{"step": step, "ntp_loss": float(loss)} for loss, step in enumerate([1, 2, 3, 2, 3, 4])]
    found = read_log(log(tmp_path / "metrics.jsonl", records))
    assert found.notes.startswith("lines whose step does not come after the one before: 1, from line 4 on; ")
    assert [point.value for point in found.curves["ntp_loss"][""].points()] == [0, 2, 3, 5]
    assert read_log(log(tmp_path / "metrics.jsonl", records[:3])).notes is None


def test_a_file_without_any_record(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no line of 2 is a step's record; move the file away"):
        read_log(log(tmp_path / "metrics.jsonl", [], rest="\0\n[]\n"))
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="no step in it yet"):
        read_log(tmp_path / "metrics.jsonl")


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


def test_frozen_shares_skip_steps_without_router_statistics(tmp_path):
    def record(step, **shares):
        router = {name: {"frozen_share": share, "p0": share, "load": [[1.0]]} for name, share in shares.items()}
        return {"step": step, "router": router}

    records = [record(1), record(2, hu=[0.25]), record(3, hu=[0.5]), record(4)]
    found = read_log(log(tmp_path / "metrics.jsonl", records)).frozen_shares()
    assert found == {"step 2": {"hu": [0.25]}, "step 3": {"hu": [0.5]}}


def test_layers_are_parsed_where_they_are_drawn(tmp_path, monkeypatch):
    """All other records with them cost what the rest of their lines does."""
    router = {"hu": {"frozen_share": [0.25], "p0": [0.1], "load": [[0.25, 0.75]]}}
    records = [{"step": step, "ntp_loss": 1.0, "router": router, "lr": 0.5} for step in range(1, 101)]
    path, parsed, from_json = log(tmp_path / "metrics.jsonl", records), [], sound_record.from_json
    monkeypatch.setattr(sound_record, "from_json", lambda line: parsed.append(b"load" in line) or from_json(line))
    found = read_log(path)
    assert parsed.count(True) == 2 and [end["step"] for end in found.router_ends] == [1, 100]
    assert found.curves["lr"][""].last == 100


def test_a_line_whose_layers_lie_otherwise_is_parsed_whole(tmp_path):
    router = '{"]]}}": {"load": [[0.25, 0.75]], "p0": [0.1], "frozen_share": [0.25]}}'
    path = log(tmp_path / "metrics.jsonl", [], rest=f'{{"step": 1, "router": {router}, "lr": 0.5}}\n')
    found = read_log(path)
    assert found.last == {"step": 1, "lr": 0.5} and found.router_ends[0]["router"]["]]}}"]["p0"] == [0.1]
    assert found.damaged.count == 0


def test_damaged_layers_are_told(tmp_path):
    path = log(tmp_path / "metrics.jsonl", [{"step": 1, "router": {"hu": {"load": [[0.5]]}}, "lr": 0.5}])
    found = read_log(path)
    assert found.notes.startswith("lines left out: 1") and not found.router_ends


def test_a_packed_curve_is_the_same():
    made = curve([math.sin(step) for step in range(1000)])
    points, smooth = made.points(), made.smoothed(20)
    made.pack()
    assert (made.points(), made.smoothed(20)) == (points, smooth)


def test_of_a_long_file_some_lines_are_parsed(tmp_path, monkeypatch, capsys):
    records = [{"step": step, "ntp_loss": float(step)} for step in range(1, 1002)]
    records[500] |= VALIDATION
    path, parsed, from_json = log(tmp_path / "metrics.jsonl", records), [], sound_record.from_json
    monkeypatch.setattr(run_log, "_MOST_BYTES", path.stat().st_size // 10)
    monkeypatch.setattr(sound_record, "from_json", lambda line: parsed.append(line) or from_json(line))
    found = read_log(path)
    assert len(parsed) == 102 and found.last["step"] == 1001 and found.validation_ends[0]["step"] == 501
    assert found.curves["ntp_loss"][""].first == 10
    assert "of 10 lines one is read, for the file is long" in capsys.readouterr().err
