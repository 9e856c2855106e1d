"""A line of metrics.jsonl has the shape of a step's record, or is none."""

import json

import pytest

from megatron_lpr.reporting.sound_record import sound_record

ROUTER = {"frozen_share": [0.5], "p0": [0.25], "load": [[0.5, 0.5]]}
SUMMARY = dict.fromkeys(("frozen_share", "p0", "busiest_expert"), {"mean": 1.0, "min": 1.0, "max": 1.0})
RECORD = {
    "step": 3, "time": "2026-11-25T12:30:00.000Z", "steps": 9, "stage": "one", "ntp_loss": 1.5, "lr": 1,
    "ntp_loss_per_language": {"hu": 1.5}, "tokens_per_language": {"hu": 7}, "router": {"hu": ROUTER},
    "router_summary": {"hu": SUMMARY}, "validation": {"bits_per_byte": {"hu": 1.0}},
    "ranks": {
        "compute_seconds": {"median": 1.0, "max": 2.0, "rank": 1, "host": "n"},
        "memory_gb": {"max": 3.0, "rank": 0, "host": "n"},
    },
}  # fmt: skip


def read(**changes):
    return sound_record(json.dumps(RECORD | changes))


def test_a_record_stays_what_it_is():
    assert read() == RECORD and read(of_another_version=[1]) == RECORD
    assert sound_record('{"step": 1.0, "of": 2}') == {"step": 1}


@pytest.mark.parametrize(
    "line",
    ["", "{", "[1]", '"step"', "5", "null", "{}", '{"step": null}', "[" * 100_000, b"\xff\x00", '{"step": 1} {}'],
)
def test_what_is_no_record(line):
    assert sound_record(line) is None


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": step} for step in (-1, 1.5, True, 1e30, "1", 10**30, [1], float("nan"))),
        *({"ntp_loss": loss} for loss in ("1.5", [1.5], {"hu": 1.5}, True)),
        {"steps": "9"},
        {"stage": 1},
        {"time": {}},
        {"tokens_per_language": [7]},
        {"tokens_per_language": {"hu": 7.5}},
        {"ntp_loss_per_language": {"hu": "x"}},
        {"validation": {"retention": {"hu": 1.0}}},
        {"validation": {"bits_per_byte": 1.0}},
        {"router": {"hu": ROUTER | {"load": [0.5]}}},
        {"router": {"hu": {"frozen_share": [0.5]}}},
        {"router_summary": {"hu": {}}},
        {"ranks": []},
    ],
)
def test_another_shape_makes_it_none(changes):
    assert read(**changes) is None


@pytest.mark.parametrize(
    "changes, gone",
    [
        *(({"ntp_loss": number}, "ntp_loss") for number in (None, float("nan"), float("inf"), 10**200)),
        ({"tokens_per_language": {"hu": None}}, "tokens_per_language"),
        ({"validation": {"bits_per_byte": {"hu": None}, "retention": {"en": 9.0}}}, "validation"),
        ({"router": {"hu": ROUTER | {"load": [[0.5, None]]}}}, "router"),
        ({"router": {"hu": ROUTER | {"p0": []}}}, "router"),
        ({"ranks": RECORD["ranks"] | {"memory_gb": {"max": None, "rank": 0, "host": "n"}}}, "ranks"),
    ],
)
def test_what_has_no_number_is_left_out(changes, gone):
    assert read(**changes) == {key: value for key, value in RECORD.items() if key != gone}


def test_other_languages_stay():
    assert read(ntp_loss_per_language={"hu": None, "en": 2.0})["ntp_loss_per_language"] == {"en": 2.0}
