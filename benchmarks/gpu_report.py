"""The report of a machine with a GPU: the tests that need one, and what its training steps cost.

    make gpu-report                          # or: python benchmarks/gpu_report.py [arguments of train_step.py]

Writes benchmarks/results/<date>-<hardware>.json and .md, versions included; a further report of the day has -2, -3
after its name.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import train_step

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
TESTS = "tests/gpu"


def tested(report: Path) -> dict[str, Any]:
    """What the GPU tests came to, and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", TESTS, f"--junitxml={report}"]
    status = subprocess.run(command, cwd=ROOT).returncode
    if not report.is_file():
        return {"status": status, "counts": {}, "failed": [f"pytest ended with status {status}"]}
    counts, failed = Counter[str](), []
    for case in ET.parse(report).iter("testcase"):
        ends = {child.tag for child in case} & {"failure", "error", "skipped"}
        end = {"failure": "failed", "error": "failed", "skipped": "skipped"}.get(min(ends, default=""), "passed")
        counts[end] += 1
        if end == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {"status": status, "counts": dict(counts), "failed": failed}


def free_name(name: str) -> str:
    """The name, with the first number after it that no earlier report has: figures are never written over."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not any((RESULTS / f"{name}.{end}").exists() for end in ("md", "json")))


class Twice(io.TextIOBase):
    """Writes to two streams what is written to it."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self.both = first, second

    def write(self, text: str) -> int:
        for stream in self.both:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self.both:
            stream.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="measure only")
    options, rest = parser.parse_known_args(arguments)
    if not torch.cuda.is_available():
        print(
            "gpu-report: this machine has no CUDA device that torch can use; run it on one with a GPU", file=sys.stderr
        )
        return 2
    around = train_step.surroundings()
    RESULTS.mkdir(exist_ok=True)
    name = free_name(f"{around['date']}-{re.sub('[^a-z0-9]+', '-', around['hardware'].lower()).strip('-')}")
    figures, page = RESULTS / f"{name}.json", RESULTS / f"{name}.md"
    tests = tested(RESULTS / f"{name}.xml") if options.tests else None
    (RESULTS / f"{name}.xml").unlink(missing_ok=True)
    with open(page, "w", encoding="utf-8") as file, contextlib.redirect_stdout(Twice(sys.stdout, file)):
        print(f"# {around['hardware']}, {around['date']}\n")
        if tests:
            print(f"`pytest {TESTS}`: " + ", ".join(f"{count} {end}" for end, count in tests["counts"].items()) + "\n")
            print("".join(f"* failed: {test}\n" for test in tests["failed"]))
        train_step.main([*rest, "--json", str(figures)])
    figures.write_text(json.dumps(json.loads(figures.read_text()) | {"tests": tests}, indent=1) + "\n")
    print(f"\n{page.relative_to(ROOT)} and {figures.name}: add them to the repository")
    return int(bool(tests and tests["status"]))


if __name__ == "__main__":
    sys.exit(main())
