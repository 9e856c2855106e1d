"""docs/metrics.md names every key that a run writes, and no other."""

import re
from pathlib import Path

from megatron_lpr.data.sampler.inspect_data import DocumentPlace
from megatron_lpr.reporting.metrics_log import (
    OverLayers,
    RanksRecord,
    RouterMetrics,
    RouterSummary,
    StepMetrics,
    ValidationRecord,
)
from megatron_lpr.training.run_files import End, Start

PAGE = (Path(__file__).resolve().parents[3] / "docs/metrics.md").read_text(encoding="utf-8")


def keys_of_tables(title):
    """First columns of the tables of each kind in a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    tables = re.findall(r"((?:^\|.*\n)+)", section, re.MULTILINE)
    return [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in tables]


def test_keys_of_metrics():
    step, summary, validation, ranks = keys_of_tables("metrics.jsonl")
    assert step == list(StepMetrics.__annotations__)
    assert ranks == list(RanksRecord.__annotations__)
    assert validation == list(ValidationRecord.__annotations__)
    assert summary == list(RouterSummary.__annotations__)
    for name in [*OverLayers.__annotations__, *RouterMetrics.__annotations__]:
        assert f"`{name}`" in PAGE


def test_keys_of_starts():
    assert keys_of_tables("starts.jsonl") == [list(Start.__annotations__)]


def test_keys_of_ends():
    assert keys_of_tables("ends.jsonl") == [list(End.__annotations__)]


def test_keys_of_marked_documents():
    assert keys_of_tables("marked.jsonl") == [["step", *DocumentPlace.__annotations__]]
