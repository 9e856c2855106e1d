"""What metrics.jsonl shows of a run, read once, line by line, and kept small: 50,000 steps are a few hundred points."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lpr.errors import UserError
from megatron_lpr.reporting.metrics_log import StepMetrics, each_record

MOST_POINTS = 300
# what is kept of a record, as its keys lie inside each other; * is any language
PATHS = (
    "ntp_loss", "balance_loss", "lpr_loss", "ntp_loss_per_language/*",
    "validation/bits_per_byte/*", "validation/retention/*",
    "router_summary/*/frozen_share/mean", "router_summary/*/busiest_expert/mean",
    "grad_norm", "lr", "router_lr",
    "tokens_per_second", "tflops_per_device", "mfu", "ranks/memory_gb/max",
)  # fmt: skip
_KEYS = {path: path.split("/") for path in PATHS}


class Point(NamedTuple):
    """The mean of some steps, at the mean of their numbers, and what they have at the least and the most."""

    step: float
    value: float
    least: float
    most: float


class Curve:
    """A number of each step, in as many points as a picture can show: where there are more, neighbours are joined."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self.width = 1  # steps of a point
        self.first, self.last = math.inf, -math.inf
        self._most = most
        self._sums: dict[int, list[float]] = {}  # by place: values, sum of their steps, their sum, least, most

    def add(self, step: int, value: float) -> None:
        self.first, self.last = min(self.first, step), max(self.last, step)
        place = step // self.width
        sums = self._sums.get(place)
        if sums is None:
            self._sums[place] = [1, step, value, value, value]
            while len(self._sums) > self._most:
                self._join()
        else:
            _join(sums, (1, step, value, value, value))

    def _join(self) -> None:
        self.width *= 2
        joined: dict[int, list[float]] = {}
        for place, sums in self._sums.items():
            if place // 2 in joined:
                _join(joined[place // 2], sums)
            else:
                joined[place // 2] = sums
        self._sums = joined

    def points(self) -> list[Point]:
        """In the order of the steps."""
        return [Point(steps / n, total / n, least, most) for n, steps, total, least, most in self._in_order()]

    def smoothed(self, most: int) -> list[Point]:
        """The points with the means of their neighbours too, so that at most `most` of them are apart from each other.

        Towards the ends fewer neighbours count, as many on both sides, so that a curve begins and ends where it does.
        """
        sums, points = self._in_order(), self.points()
        reach = len(sums) // (2 * most)
        if not reach:
            return points
        counts, totals = [0.0], [0.0]
        for n, _, total, _, _ in sums:
            counts.append(counts[-1] + n)
            totals.append(totals[-1] + total)
        found = []
        for place, point in enumerate(points):
            side = min(reach, place, len(points) - 1 - place)
            first, end = place - side, place + side + 1
            mean = (totals[end] - totals[first]) / (counts[end] - counts[first])
            found.append(point._replace(value=mean))
        return found

    def _in_order(self) -> list[list[float]]:
        return [sums for _, sums in sorted(self._sums.items())]


def _join(sums: list[float], more: Sequence[float]) -> None:
    n, steps, total, least, most = more
    sums[0] += n
    sums[1] += steps
    sums[2] += total
    if least < sums[3]:
        sums[3] = least
    if most > sums[4]:
        sums[4] = most


@dataclass
class RunLog:
    """curves: by path and language, which is empty where the path has none."""

    curves: dict[str, dict[str, Curve]] = field(default_factory=lambda: {path: {} for path in PATHS})
    last: StepMetrics | None = None
    router_ends: list[StepMetrics] = field(default_factory=list)  # the first and last with all layers' statistics
    validation_ends: list[StepMetrics] = field(default_factory=list)  # the first and last with a validation


def read_log(path: str | Path) -> RunLog:
    """Read a metrics.jsonl; a line that a running process has not finished is left out.

    Raises:
        UserError: no such file, no step in it, or a line that is no record.
    """
    log = RunLog()
    for number, record in enumerate(each_record(path), start=1):
        try:
            _take(log, record)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(f"metrics {path}, line {number}: not a step's record; remove the line") from None
    if log.last is None:
        raise UserError(f"metrics {path}: no step in it yet; wait until the run has made one")
    return log


def _take(log: RunLog, record: StepMetrics) -> None:
    if not isinstance(record["step"], int):
        raise TypeError
    log.last = record
    if record.get("router"):
        log.router_ends = [*log.router_ends[:1], record]
    if record.get("validation"):
        log.validation_ends = [*log.validation_ends[:1], record]
    step = record["step"]
    for path, keys in _KEYS.items():
        for language, value in _values(record, keys):
            if math.isfinite(value):
                curves = log.curves[path]
                if language not in curves:
                    curves[language] = Curve()
                curves[language].add(step, value)


def _values(record: Mapping[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, float]]:
    """What a record has there, by language."""
    found: Any = record
    for place, key in enumerate(keys):
        if key == "*":
            rest = keys[place + 1 :]
            for language, its in found.items():
                for inner in rest:
                    its = its[inner]
                if its is not None:
                    yield language, its
            return
        found = found.get(key)
        if found is None:
            return
    yield "", found


def first_and_last(records: Iterable[StepMetrics]) -> dict[str, dict[str, list[float]]]:
    """Frozen share per language at both ends of a run; {} without statistics of the layers.

    The first step's forward pass sees the routers as the run before left them. Holds two records at a time.
    """
    ends: list[Any] = []
    for record in records:
        if record.get("router"):
            ends = [*ends[:1], record]
    return {
        f"step {record['step']}": {language: m["frozen_share"] for language, m in record["router"].items()}
        for record in ends
    }
