"""The plan of a run against what an H100 held in the steps of benchmarks/results: figures that nothing here makes."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"
MEASURED = FOLDER / "results/2026-11-26-nvidia-h100-grouped-products.json"


@pytest.fixture(scope="module")
def rows(megatron_imported):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        from plan_against_gpu import compared

        return list(compared(json.loads(MEASURED.read_text()), "h100"))


def test_what_is_held_is_planned_to_the_byte(rows):
    assert len(rows) == 13
    for row in rows:
        planned, measured = row.held
        assert planned == measured, row.line()


def test_the_most_is_planned_within_a_few_percent(rows):
    """What is more or less than a third of a GPU, that is: small models have gaps of a few hundred MB.

    Up to 0.4% of what was measured is the second copy of a frozen expert's output, which was kept that day.
    """
    for row in rows:
        planned, measured = row.peak
        assert -0.024 < planned / measured - 1 < 0.12 or measured < 10e9, row.line()


def test_no_step_is_faster_than_its_bound(rows):
    for row in rows:
        least, took = row.seconds
        assert least < took, row.line()
