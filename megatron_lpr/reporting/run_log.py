"""What metrics.jsonl shows of a run, read once, line by line, and kept small: 50,000 steps are a few hundred points."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from megatron_lpr.errors import UserError, warn
from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.reporting.sound_record import has_router, sound_record

MOST_POINTS = 300
_MOST_BYTES = 1 << 28  # that are parsed, in some 20 seconds
# what is kept of a record, as its keys lie inside each other; * is any language
PATHS = (
    "ntp_loss", "balance_loss", "lpr_loss", "ntp_loss_per_language/*",
    "validation/bits_per_byte/*", "validation/retention/*",
    "router_summary/*/frozen_share/mean", "router_summary/*/busiest_expert/mean",
    "grad_norm", "lr", "router_lr",
    "tokens_per_second", "tflops_per_device", "mfu", "ranks/memory_gb/max",
)  # fmt: skip
_SUMS = 5  # of a point
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
        self._packed: array[float] | None = None

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

    def pack(self) -> None:
        """Nothing more is added: it takes an eighth of the memory from now on."""
        packed = array("d")
        for sums in self._in_order():
            packed.extend(sums)
        self._packed, self._sums = packed, {}

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
        if self._packed is not None:
            return [list(self._packed[place : place + _SUMS]) for place in range(0, len(self._packed), _SUMS)]
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
class Lines:
    """Of one kind: how many, and the number of the first."""

    count: int = 0
    first: int = 0

    def add(self, number: int) -> None:
        self.count += 1
        self.first = self.first or number


@dataclass
class RunLog:
    """curves: by path and language, which is empty where the path has none."""

    curves: dict[str, dict[str, Curve]] = field(default_factory=lambda: {path: {} for path in PATHS})
    last: StepMetrics | None = None
    router_ends: list[StepMetrics] = field(default_factory=list)  # the first and last with all layers' statistics
    validation_ends: list[StepMetrics] = field(default_factory=list)  # the first and last with a validation
    damaged: Lines = field(default_factory=Lines)  # no step's record
    backwards: Lines = field(default_factory=Lines)  # the step is not after the one before
    is_cut: bool = False  # the last line has no end
    every: int = 1  # of so many lines one is read, where the file is long

    @property
    def notes(self) -> str | None:
        """What is wrong with the file, for those who see the rest of it; None: nothing."""
        notes = []
        if self.every > 1:
            notes.append(f"of {self.every} lines one is read, for the file is long; curves have no other steps")
        if self.damaged.count:
            notes.append(
                f"lines left out: {self.damaged.count:,}, no steps' records, from line {self.damaged.first:,} on"
            )
        if self.is_cut:
            notes.append("the last line left out, which is not finished")
        if self.backwards.count:
            notes.append(
                f"lines whose step does not come after the one before: {self.backwards.count:,}, from line "
                f"{self.backwards.first:,} on; of a step that is there twice curves have the mean"
            )
        return "; ".join(notes) or None

    def frozen_shares(self) -> dict[str, dict[str, list[float]]]:
        """Frozen share per language at both ends of a run; {} without statistics of the layers.

        The first step's forward pass sees the routers as the run before left them.
        """
        return {
            f"step {end['step']}": {language: its["frozen_share"] for language, its in end["router"].items()}
            for end in self.router_ends
        }


def read_log(path: str | Path) -> RunLog:
    """Read a metrics.jsonl; lines that are no step's record are left out, which the log notes and a warning says.

    Raises:
        UserError: no such file, it cannot be read, or there is no step in it.
    """
    path, log = Path(path), RunLog()
    if not path.is_file():
        raise UserError(f"metrics {path}: no such file; give the output folder of a run that has made a step")
    with_layers: list[tuple[int, bytes]] = []  # of all lines that have them, the first and the last
    try:
        log.every = max(path.stat().st_size // _MOST_BYTES, 1)
        with path.open("rb") as lines:
            for number, line in _read_lines(lines, log.every):
                if _take_line(log, number, line) and has_router(line):
                    with_layers = [*with_layers[:1], (number, line)]
    except OSError as error:
        raise UserError(f"metrics {path}: cannot be read ({error.strerror}); look at the disk") from None
    if log.last is None and log.damaged.count:
        raise UserError(f"metrics {path}: no line of {log.damaged.count:,} is a step's record; move the file away")
    if log.last is None:
        raise UserError(f"metrics {path}: no step in it yet; wait until the run has made one")
    _take_ends(log, with_layers)
    if log.notes:
        warn(f"metrics {path}: {log.notes}")
    return log


def _read_lines(lines: Iterable[bytes], every: int) -> Iterator[tuple[int, bytes]]:
    """With their numbers: one of so many, the last, and all those that have what few have."""
    number, skipped = 0, b""
    for number, line in enumerate(lines, start=1):
        skipped = b"" if number % every == 0 or b'"validation":' in line or b'"router":' in line else line
        if not skipped:
            yield number, line
    if skipped:
        yield number, skipped


def _take_line(log: RunLog, number: int, line: bytes) -> bool:
    """Whether it is a step's record."""
    if not line.endswith(b"\n"):
        log.is_cut = True
    elif (record := sound_record(line, layers=False)) is None:
        log.damaged.add(number)
    else:
        if log.last is not None and record["step"] <= log.last["step"]:
            log.backwards.add(number)
        _take(log, record)
        return True
    return False


def _take_ends(log: RunLog, lines: Sequence[tuple[int, bytes]]) -> None:
    """Parse the statistics of every layer where they are drawn, and keep them small: there may be millions of them."""
    for number, line in lines:
        record = sound_record(line)
        if record is None:
            log.damaged.add(number)
        elif record.get("router"):
            for its in record["router"].values():
                its["load"] = [cast(list[float], array("f", load)) for load in its["load"]]
            log.router_ends.append(record)
    for of_path in log.curves.values():
        for curve in of_path.values():
            curve.pack()


def _take(log: RunLog, record: StepMetrics) -> None:
    log.last = record
    if record.get("validation"):
        log.validation_ends = [*log.validation_ends[:1], record]
    step = record["step"]
    for path, keys in _KEYS.items():
        for language, value in _values(record, keys):
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
                yield language, its
            return
        found = found.get(key)
        if found is None:
            return
    yield "", found
