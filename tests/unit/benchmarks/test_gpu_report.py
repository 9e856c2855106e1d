"""benchmarks/gpu_report.py keeps what an earlier run of the same day and machine has found."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.parametrize(
    "there, name",
    [
        ([], "day-gpu"),
        (["day-gpu.md", "day-gpu.json"], "day-gpu-2"),
        (["day-gpu.md"], "day-gpu-2"),
        (["day-gpu.json", "day-gpu-2.json"], "day-gpu-3"),
        (["day-gpu-2.md", "day-gpu-other.md"], "day-gpu"),
    ],
)
def test_a_further_report_of_the_day_is_a_further_pair(monkeypatch, tmp_path, there, name):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu_report

    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    for file in there:
        (tmp_path / file).touch()
    assert gpu_report.free_name("day-gpu") == name
