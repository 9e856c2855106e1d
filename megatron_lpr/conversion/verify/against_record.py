"""Do the checkpoint, the record that lies in an export, and whoever asks say the same of what was done?"""

from pathlib import Path

from megatron_lpr.conversion.record import RECORD_FILE, ExportRecord, Made, digests
from megatron_lpr.conversion.verify.report import Check, listed


def check_record(
    record: ExportRecord | None,
    checkpoint: Made | None,
    recipe: Made | None,
    num_frozen: int | None,
    base_dir: Path,
    grafted_on: str | Path | None,
    frozen_sha256: str,
) -> Check:
    """Arguments as of `verify_export`; record: the export's own. frozen_sha256: of the export as it is now."""
    problems, notes = [], []
    own = f"the export's {RECORD_FILE}"
    if recipe and checkpoint:
        notes += checkpoint.differences(recipe, "the checkpoint", "the recipe, which does not count")
    if record:
        if checkpoint:
            problems += record.made.differences(checkpoint, own, "the checkpoint")
        elif recipe:
            problems += record.made.differences(recipe, own, "the recipe: give the run's own, or --checkpoint")
        if num_frozen is not None and record.made.num_experts and num_frozen != record.made.untouched:
            problems.append(f"{record.made.untouched} experts are frozen in {own}, {num_frozen} were asked for")
        problems += _other_files(record, base_dir, grafted_on)
        if record.frozen_sha256 and frozen_sha256 and record.frozen_sha256 != frozen_sha256:
            problems.append("the frozen tensors are not those that were exported")
    elif checkpoint:
        notes.append(f"the export has no {RECORD_FILE}; the checkpoint says what was done")
    else:
        source = "the recipe" if recipe else "the command" if num_frozen is not None else "its config"
        notes.append(f"the export has no {RECORD_FILE}: what is frozen, and top-k, are taken from {source}")
    if record:
        notes.append("the export's own agrees" + (f", step {record.step}" if record.step is not None else ""))
    return Check(name="record", ok=not problems, detail="; ".join(problems or notes))


def _other_files(record: ExportRecord, base_dir: Path, grafted_on: str | Path | None) -> list[str]:
    """Folders that are not the models which the export was made of, by their small files."""
    if record.instruct is not None and grafted_on is None:
        return ["the export was grafted: give --graft-delta BASE INSTRUCT, the two models that it was made with"]
    if record.instruct is None and grafted_on is not None:
        return ["the export was not grafted (--graft-delta)"]
    pairs = [(record.base, base_dir)]
    if record.instruct is not None:
        pairs = [(record.base, Path(grafted_on)), (record.instruct, base_dir)]
    return [
        f"'{folder}' is not the model that the export was made with: {listed(changed)} differ"
        for saved, folder in pairs
        if (changed := sorted({name for name, _ in digests(folder).items() ^ saved.items()}))
    ]
