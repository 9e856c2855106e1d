"""The files in a run's output folder that say what it is, how it was started and how it ended; without torch.

People edit them. What is not as it should be is left out, and said.
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import ends_a_line, from_json, lines_from_the_end, printable
from megatron_lpr.files.yaml_io import read_yaml
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.recipe.sound_part import sound_part
from megatron_lpr.reporting.sound_record import sound_record

Outcome = Literal["finished", "stopped", "failed"]
_TAIL_LINES = 1000
_LONGEST_FAULT = 200
CUT = "the last line, which is not finished, as when a run is killed while it writes"


class Start(TypedDict):
    """A line of starts.jsonl."""

    time: str  # UTC, ISO 8601
    step: int  # after which it goes on; 0: from the beginning
    hosts: list[str]  # in the order of the ranks
    world_size: int
    device: str  # of rank 0: the GPU's name, or cpu
    slurm_job_id: str | None
    command: str  # of rank 0
    working_folder: str  # what the recipe's paths are relative to
    git: str | None  # commit of megatron_lpr's source tree, with -dirty where it has changes; None: not in git
    versions: dict[str, str]  # python, megatron_lpr and the packages it computes with


class End(TypedDict):
    """A line of ends.jsonl."""

    time: str  # UTC, ISO 8601
    start: str | None  # whose end it is: its time
    rank: int  # that tells it
    step: int  # that the run had made
    outcome: Outcome
    reason: str | None  # of a run that failed


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What they say; {} and [] of files that are not there.

    recipe: as it is written. settings: those of it that are what they should be. start: the newest. ends: since then.
    faults: what is left out of the three files, a line each.
    """

    recipe: dict[str, Any]
    settings: dict[str, Any]
    start: dict[str, Any]
    ends: list[dict[str, Any]]
    faults: list[str]

    @staticmethod
    def read(run: str) -> "RunFiles":
        """Raises UserError where it is no run's folder, a file in it cannot be read, or the recipe is no YAML."""
        folder = Path(run)
        if not folder.is_dir():
            raise UserError(f"run {run}: no such folder; give the output folder of a run")
        if not any((folder / name).is_file() for name in ("starts.jsonl", "metrics.jsonl")):
            raise UserError(f"run {run}: no training run there (no starts.jsonl); give the output folder of a run")
        path, faults = folder / "recipe.yaml", list[str]()
        tree = read_yaml(path, str(path)) if os.path.lexists(path) else None
        settings = sound_part(Recipe, {} if tree is None else tree, path.name, faults)
        start = sound_part(Start, newest_start(folder, faults), "starts.jsonl", faults)
        its = [end for end in _records(folder / "ends.jsonl", faults) if start.get("time") in (None, end.get("start"))]
        ends = [sound_part(End, end, "ends.jsonl", faults) for end in its]
        told = [f if len(f) <= _LONGEST_FAULT else f"{f[:_LONGEST_FAULT]}…" for f in map(printable, faults)]
        return RunFiles(
            recipe=tree if isinstance(tree, dict) else {}, settings=settings, start=start, ends=ends, faults=told
        )

    def section(self, name: str) -> dict[str, Any]:
        """Of the settings; {} where there is none."""
        found: dict[str, Any] = self.settings.get(name, {})
        return found


def newest_start(folder: Path, faults: list[str]) -> dict[str, Any]:
    """As it is written; {} where there is none. UserError: its file cannot be read."""
    return (_records(folder / "starts.jsonl", faults) or [{}])[-1]


def _records(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    """The last records of a file of JSON lines that have a time, as all have that a run writes; [] without a file.

    Raises:
        UserError: it cannot be read.
    """
    lines, is_cut = last_lines(path, _TAIL_LINES)
    found = [record for line in lines if (record := from_json(line)) is not None and "time" in record]
    if damaged := len(lines) - len(found):
        faults.append(f"{path.name}: lines near its end that are no records with a time: {damaged:,}")
    if is_cut:
        faults.append(f"{path.name}: {CUT}")
    return found


def last_lines(path: Path, most: int) -> tuple[list[bytes], bool]:
    """So many that have their end, however long they are, and whether one follows that has none.

    ([], False) without a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return list(itertools.islice(lines_from_the_end(path), most))[::-1], not ends_a_line(path)
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); look at the disk") from None


def last_validation(path: Path) -> dict[str, Any] | None:
    """Of the newest step that has one, which may be many steps old: metrics.jsonl is read from its end."""
    mark = b'"validation":'
    try:
        for line in lines_from_the_end(path):
            record = sound_record(line, layers=False) if mark in line else None
            if record and "validation" in record:
                return {"step": record["step"], **record["validation"]}
    except OSError:
        pass  # there is no file yet; what cannot be read has been told
    return None
