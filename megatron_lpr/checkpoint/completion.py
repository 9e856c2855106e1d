"""The end of a save: what all ranks have written becomes a checkpoint.

Rank 0 does it at the step at which it learns that every share is written. Where a crash comes first, the next start of
the run does it (`complete_saves`), from what each rank has left beside its share:

    .writing_step_00000024/__0_0.distcp, ...   what the ranks have written
    .writing_step_00000024/.shares/0           of rank 0: its plan, where its items lie, its checksums, and the run
    .writing_step_00000024/.shares/1           of rank 1, without the run
"""

import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from megatron_lpr.checkpoint.manifest import write_manifest
from megatron_lpr.checkpoint.metadata_file import METADATA_FILE, read_description
from megatron_lpr.checkpoint.run_folder import SHARES, WRITING, publish
from megatron_lpr.checkpoint.run_state import RunState, named_by_latest, write_run_state
from megatron_lpr.errors import UserError
from megatron_lpr.files.checksum import Checksum, ChecksummedFile, fault_of_file
from megatron_lpr.files.locks import run_lock


@dataclass(kw_only=True)
class Written:
    """What a rank tells of its share: where its items lie, the checksums of its files, or what went wrong."""

    results: list[WriteResult] = field(default_factory=list)
    checksums: dict[str, Checksum] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


_Told = tuple[list[SavePlan], list[Written], RunState]


def make_writing_folder(writing: Path) -> None:
    """Where the ranks write; what a killed save has left there goes."""
    shutil.rmtree(writing, ignore_errors=True)
    (writing / SHARES).mkdir(parents=True)


def run_note(root: Path, state: RunState, ranks: int) -> dict[str, Any]:
    """What rank 0 leaves beside its share, so that another start can complete the save.

    after: the checkpoint before. Where `latest` names another one by then, the run has turned back, and the save
    belongs to another future.
    """
    return {"state": json.dumps(state.__dict__), "ranks": ranks, "after": named_by_latest(root)}


def leave_share(writing: Path, rank: int, plan: SavePlan, written: Written, note: dict[str, Any]) -> None:
    """Say that a rank's share is on the disk."""
    sums = {name: (checksum.size, checksum.xxh3_128) for name, checksum in written.checksums.items()}
    # the plan on its own, or .metadata would be pickled in another way where it shares objects with the results
    share = {"plan": pickle.dumps(plan), "results": written.results, "checksums": sums}
    with ChecksummedFile(writing / SHARES / str(rank)) as file:
        file.write(pickle.dumps(share | note))


def described(plans: Sequence[SavePlan]) -> Metadata:
    """The tensors that the plans of all ranks come to; where they lie is not yet known."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    return planner.create_global_plan(list(plans))[1]


def complete(writing: Path, folder: Path, tensors: Metadata, shares: Sequence[Written], state: RunState) -> None:
    """Make a checkpoint of what all ranks have written. OSError where that cannot be written."""
    files = {name: checksum for share in shares for name, checksum in share.checksums.items()}
    results = sorted((r for share in shares for r in share.results), key=_place)  # threads end in any order
    places = {result.index: result.storage_data for result in results}
    with ChecksummedFile(writing / METADATA_FILE) as file:
        file.write(pickle.dumps(replace(tensors, storage_data=places)))
    files[METADATA_FILE] = file.checksum
    write_run_state(writing, replace(state, manifest=write_manifest(writing, files)))
    publish(writing, folder)
    shutil.rmtree(folder / SHARES, ignore_errors=True)


def complete_saves(output: str) -> list[str]:
    """Complete the save that a crash has cut off, if every rank had written its share; returns the checkpoint's name.

    One process does it, before the run is planned. Whether the bytes are those that were written is looked at when the
    run resumes, as for any checkpoint.

    Raises:
        UserError: another run holds the folder, or it cannot be written.
    """
    root = Path(output) / "checkpoints"
    if not cut_off(root):
        return []
    completed = []
    with run_lock(output):
        for place, (plans, shares, state) in _cut_off(root):
            name = place.name.removeprefix(WRITING)
            try:
                writing = place.rename(root / f"{WRITING}{name}")
                complete(writing, root / name, described(plans), shares, state)
            except OSError as error:
                raise UserError(
                    f"checkpoint {root / name}: a crash has cut off its save, which cannot be completed: "
                    f"{error.strerror}; make room or give the right to write there, or delete {place}"
                ) from error
            completed.append(name)
    return completed


def cut_off(root: Path) -> list[Path]:
    """Saves of which every share is written, in a folder `checkpoints`: without their names, or named but not `latest`
    yet."""
    return [place for place, _ in _cut_off(root)]


def _cut_off(root: Path) -> Iterator[tuple[Path, _Told]]:
    """What the shares of each tell too: every rank's is read, once."""
    for place in sorted(shares.parent for shares in root.glob(f"*/{SHARES}")):
        if told := _whole(place):
            yield place, told


def _whole(writing: Path) -> _Told | None:
    try:
        first = _share(writing, 0)
        if first["after"] != named_by_latest(writing.parent):
            return None
        told = [first, *(_share(writing, rank) for rank in range(1, first["ranks"]))]
        plans = [read_description(share["plan"]) for share in told]
        state = RunState(**json.loads(first["state"]))
    except Exception:  # a file that is missing or cut raises whatever it likes
        return None
    shares = []
    for share in told:
        sums = {name: Checksum(size=size, xxh3_128=text) for name, (size, text) in share["checksums"].items()}
        if any(fault_of_file(writing / name, expected, contents=False) for name, expected in sums.items()):
            return None
        shares.append(Written(results=share["results"], checksums=sums))
    return plans, shares, state


def _share(writing: Path, rank: int) -> dict[str, Any]:
    return read_description((writing / SHARES / str(rank)).read_bytes())


def _place(result: WriteResult) -> tuple[str, int]:
    return result.storage_data.relative_path, result.storage_data.offset
