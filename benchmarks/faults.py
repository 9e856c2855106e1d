"""Injects faults into toy runs, starts each again, and compares it with a run that nothing happened to.

    python benchmarks/faults.py                  # 1,000 faults
    python benchmarks/faults.py --quick          # one or two of each kind
    python benchmarks/faults.py --only flipped   # kinds with this in their name

Prints a table, and ends with status 1 where a fault had one of these ends: other bytes or losses than the quiet run's,
a traceback, a process that outlives its run, a run that does not end, one that cannot go on, steps lost beyond the save
interval, or two where a save was not yet written on every rank, or the newest checkpoint is damaged. Faults are drawn
from --seed.
"""

import argparse
import contextlib
import functools
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the two files beside it
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fault_points import (
    Damage,
    at_save_event,
    count_save_events,
    file_size_limit,
    intervals_at_risk,
    small_disk,
    steps_made,
    steps_of_starts,
)

from megatron_lpr import cli
from megatron_lpr.testing.equal_runs import differences
from megatron_lpr.testing.forked_commands import Ended, ForkedCommand, import_like
from megatron_lpr.testing.toy_models import toy_recipes, write_recipe, write_toy_project

STEPS, EVERY = 12, 3
RESTARTS = 3
ENDS = ("right bytes", "refused", "other bytes", "traceback", "orphan", "hang", "steps lost")


@dataclass
class Row:
    """A kind of fault in the table."""

    injected: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    most_lost: int = 0

    def add(self, outcome: "Outcome") -> None:
        self.injected += 1
        self.ends[outcome.end] += 1
        self.most_lost = max(self.most_lost, outcome.lost)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one fault."""

    end: str
    lost: int
    printed: str


class Bench:
    """Quiet runs of one rank and of two, and faults on copies of their beginnings."""

    def __init__(self, seconds: float) -> None:
        self.root, self.seconds = Path(tempfile.mkdtemp(prefix="faults-")), seconds
        self.running: ForkedCommand | None = None

    def prepare(self) -> None:
        root = self.root
        write_toy_project(root / "project")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert cli.main(["preprocess", str(root / "project/upcycle.yaml")]) == 0
        tree = toy_recipes(root / "project")["stage1"]
        tree |= {"checkpoint": {"every": EVERY}, "train": tree["train"] | {"steps": STEPS}}
        tree["model"] = tree["model"] | {"load": None}
        self.recipe = write_recipe(root / "recipe.yaml", tree)
        import_like(functools.partial(cli.main, self.words(root / "imports")), root / "imports.log")
        for ranks in (1, 2):
            ended = self.start(self.quiet(ranks), ranks).wait(600)
            assert set(ended.statuses) == {0}, ended.printed
        self.events = self._count_events()
        self.begun = self._begin()

    def end(self) -> None:
        """Leave nothing, whatever has ended it."""
        if self.running and self.running.is_running():
            self.running.wait(0)
        shutil.rmtree(self.root, ignore_errors=True)

    def words(self, output: Path) -> list[str]:
        return ["train", str(self.recipe), "--set", f"output={output}"]

    def quiet(self, ranks: int) -> Path:
        return self.root / f"quiet{ranks}"

    def start(self, output: Path, ranks: int = 1, before: Callable[[int], None] = lambda rank: None) -> ForkedCommand:
        log = output.with_suffix(".log")
        command = functools.partial(cli.main, self.words(output))
        self.running = ForkedCommand(command, log, ranks=ranks, before=before)
        return self.running

    def _count_events(self) -> int:
        """What a whole run does to its folder of checkpoints: opens to write, renames, removes."""
        file, output = self.root / "events", self.root / "counted"
        self.start(output, before=lambda rank: count_save_events(output, file)).wait(600)
        return int(file.read_text())

    def _begin(self) -> Path:
        """A run that was killed when it began to write its last checkpoint; two whole ones are there."""
        output = self.root / "begun"
        self.start(output, before=lambda rank: at_save_event(output, 1, signal.SIGKILL, name=f"{STEPS:08d}")).wait(600)
        assert len(list(output.glob("checkpoints/step_*"))) == 2, sorted(output.rglob("*"))
        return output

    def finish(self, output: Path, ranks: int, first: Ended | None) -> Outcome:
        """Start a run until it is done, and say how it ended."""
        limit = EVERY * intervals_at_risk(output, first.statuses if first else None)
        ended, lost = (first, 0) if first else self._again(output, ranks)
        for _ in range(RESTARTS):
            if _wrong_end(ended) or set(ended.statuses) == {0}:
                break
            ended, more = self._again(output, ranks)
            lost = max(lost, more)
        end = _wrong_end(ended) or self._end(output, ranks, ended)
        if end == "right bytes" and lost > limit:
            end = "steps lost"
        return Outcome(end=end, lost=lost, printed=ended.printed)

    def _again(self, output: Path, ranks: int) -> tuple[Ended, int]:
        """Start it again; how it ended, and how many steps it had lost."""
        reached, starts = steps_made(output), steps_of_starts(output)
        ended = self.start(output, ranks).wait(self.seconds)
        return ended, reached - steps_of_starts(output)[-1] if len(steps_of_starts(output)) > len(starts) else 0

    def _end(self, output: Path, ranks: int, ended: Ended) -> str:
        if set(ended.statuses) != {0}:
            return "refused"
        return "other bytes" if differences(output, self.quiet(ranks)) else "right bytes"


def _wrong_end(ended: Ended) -> str | None:
    if "Traceback (most recent call last)" in ended.printed:
        return "traceback"
    return "hang" if ended.has_hung else "orphan" if ended.orphans else None


Fault = Callable[[Bench, Path, random.Random, int], Outcome]


def killed_in_a_save(bench: Bench, output: Path, chance: random.Random, number: int) -> Outcome:
    event = 1 + (number * 7) % bench.events  # all of them, when there are enough faults
    running = bench.start(output, before=lambda rank: at_save_event(output, event, signal.SIGKILL))
    return bench.finish(output, 1, running.wait(bench.seconds))


def signalled(
    bench: Bench,
    output: Path,
    chance: random.Random,
    number: int,
    *,
    signum: int,
    ranks: int = 1,
    only: int | None = None,
) -> Outcome:
    """A signal after a step, or in the start before the first; a little later than that."""
    running, step = bench.start(output, ranks), chance.randrange(STEPS)
    while running.is_running() and steps_made(output) < step:
        time.sleep(0.005)
    time.sleep(chance.random() * (0.3 if step else 1.0))
    if running.is_running():
        running.kill(signum, *(() if only is None else (only,)))
    return bench.finish(output, ranks, running.wait(bench.seconds))


def stopped(bench: Bench, output: Path, chance: random.Random, number: int) -> Outcome:
    """One of two ranks, for a second."""
    running, step, rank = bench.start(output, 2), chance.randrange(STEPS), chance.randrange(2)
    while running.is_running() and steps_made(output) < step:
        time.sleep(0.005)
    if running.is_running():
        running.kill(signal.SIGSTOP, rank)
        time.sleep(1.0)
        running.kill(signal.SIGCONT, rank)
    return bench.finish(output, 2, running.wait(bench.seconds))


def one_of_two_killed(bench: Bench, output: Path, chance: random.Random, number: int) -> Outcome:
    return signalled(bench, output, chance, number, signum=signal.SIGKILL, ranks=2, only=chance.randrange(2))


def file_too_large(bench: Bench, output: Path, chance: random.Random, number: int) -> Outcome:
    largest = max(file.stat().st_size for file in bench.quiet(1).rglob("*"))
    limit = chance.randrange(1 << 14, largest)  # what it prints fits in
    running = bench.start(output, before=lambda rank: file_size_limit(limit))
    return bench.finish(output, 1, running.wait(bench.seconds))


def disk_full(bench: Bench, output: Path, chance: random.Random, number: int) -> Outcome:
    whole = sum(file.stat().st_size for file in bench.quiet(1).rglob("*") if file.is_file())
    with small_disk(output, chance.randrange(whole // 50, whole)) as enlarge:
        first = bench.start(output).wait(bench.seconds)
        enlarge()
        return bench.finish(output, 1, first)


def damaged(bench: Bench, output: Path, chance: random.Random, number: int, *, damage: str) -> Outcome:
    """A file of the newest checkpoint, each in turn."""
    shutil.copytree(bench.begun, output)
    root = output / "checkpoints"
    files = sorted(file for file in root.glob("step_*9/**/*") if file.is_file()) + [root / "latest"]
    Damage(chance).do(damage, files[number % len(files)])
    return bench.finish(output, 1, None)


FAULTS: dict[str, tuple[int, Fault]] = {  # how many of each, of a thousand
    "killed at a step of a save": (250, killed_in_a_save),
    "killed at any moment": (150, functools.partial(signalled, signum=signal.SIGKILL)),
    "one rank of two killed": (50, one_of_two_killed),
    "both ranks killed": (50, functools.partial(signalled, signum=signal.SIGKILL, ranks=2)),
    "SIGTERM": (100, functools.partial(signalled, signum=signal.SIGTERM)),
    "SIGTERM to one rank of two": (30, functools.partial(signalled, signum=signal.SIGTERM, ranks=2, only=1)),
    "a rank stopped for a second": (20, stopped),
    "disk full": (50, disk_full),
    "no file larger than": (50, file_too_large),
    "a bit flipped": (100, functools.partial(damaged, damage="flip")),
    "a file cut": (50, functools.partial(damaged, damage="cut")),
    "a file emptied": (50, functools.partial(damaged, damage="empty")),
    "a file removed": (50, functools.partial(damaged, damage="remove")),
}


def inject(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    for kind, (share, fault) in FAULTS.items():
        if options.only not in kind:
            continue
        if fault is disk_full and os.geteuid() != 0:
            print(f"{kind}: left out, for only root can mount a small disk", file=sys.stderr)
            continue
        row = Row()
        for number in range(max(1, share * options.faults // 1000)):
            output = bench.root / "faulty"
            outcome = fault(bench, output, random.Random(f"{options.seed} {kind} {number}"), number)
            row.add(outcome)
            if outcome.end != "right bytes" and options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{kind} {number}: {outcome.end}.log").write_text(outcome.printed)
            shutil.rmtree(output, ignore_errors=True)
            output.with_suffix(".log").unlink(missing_ok=True)
        yield kind, row


def print_line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--quick", dest="faults", action="store_const", const=1, help="one of each kind")
    parser.add_argument("--only", default="", help="kinds with this in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120.0, help="a run that takes longer hangs")
    parser.add_argument(
        "--keep", type=Path, help="folder for what was printed in runs that ended otherwise than they should"
    )
    options = parser.parse_args()
    bench, rows, begun = Bench(options.seconds), list[Row](), time.monotonic()
    print_line("fault", "injected", *ENDS, f"most steps lost (save interval {EVERY})")
    print_line("---", *["---:"] * (len(ENDS) + 2))
    try:
        bench.prepare()
        for kind, row in inject(bench, options):
            rows.append(row)
            print_line(kind, row.injected, *(row.ends[end] or "" for end in ENDS), row.most_lost)
    finally:
        bench.end()
    count = sum(row.injected for row in rows)
    print(f"\n{count} faults, seed {options.seed}, in {(time.monotonic() - begun) / 60:.1f} minutes")
    return int(any(row.ends["right bytes"] < row.injected for row in rows))


if __name__ == "__main__":
    sys.exit(main())
