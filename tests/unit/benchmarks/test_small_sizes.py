"""Benchmarks run to their end at sizes that measure nothing, so that the commands beside our figures stay true."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lpr.testing.toy_models import write_toy_text

FOLDER = Path(__file__).parents[3] / "benchmarks"
BENCHMARKS = {
    "data": "--documents 1000",
    "merge": "--parts 8 --documents 2 --rounds 1",
    "checkpoint": "--hidden 64 --layers 2 --saves 1",
    "dispatch": "--ranks 2 --new-experts 2 --tokens 64",
    "frozen_memory": "--hidden 64 --layers 2 --ranks 1",
    "flops": "{model}",
    "preprocessing": "{model} {text} --megabytes 1 --workers 1 --rounds 1",
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prints_its_table(name, toy_base, tmp_path):
    text = write_toy_text(tmp_path / "text.jsonl", "qaa")
    words = BENCHMARKS[name].format(model=toy_base, text=text).split()
    command = [sys.executable, FOLDER / f"{name}.py", *words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    _, ruler, row, *_ = [line for line in ended.stdout.splitlines() if line.startswith("|")]
    assert set(ruler) <= set("|-: ") and any(character.isdigit() for character in row), ended.stdout
