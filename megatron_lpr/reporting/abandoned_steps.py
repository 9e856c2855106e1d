"""What a metrics.jsonl holds beyond the step at which its run goes on: a future that will not happen."""

import os
import shutil
from pathlib import Path

from megatron_lpr.files.json_lines import from_json, utc_now, writing


def set_aside(path: Path, step: int) -> str | None:
    """Move the lines of later steps than `step` into a file of their own, metrics.abandoned-<time>.jsonl.

    The file is shortened in place, never replaced: whoever else has it open goes on writing into the same file. A last
    line without its end, of a killed process, is dropped. Reads line by line.

    Returns:
        A sentence that says what was moved where; None where nothing was.

    Raises:
        UserError: one of the files cannot be written.
    """
    kept, steps = _kept_bytes(path, step)
    if kept == path.stat().st_size:
        return None
    aside = path.with_name(f"{path.stem}.abandoned-{utc_now().replace('-', '').replace(':', '')}{path.suffix}")
    with writing(path), path.open("r+b") as file:
        if steps:
            file.seek(kept)
            with aside.open("xb") as out:
                shutil.copyfileobj(file, out)
                out.flush()
                os.fsync(out.fileno())
        file.truncate(kept)
    if not steps:
        return None
    named = [number for number in steps if number is not None]
    which = f"of steps {min(named)} to {max(named)}" if named else "that cannot be read"
    return f"{path}: lines {which}, beyond step {step} where this run goes on, are now in {aside.name}"


def _kept_bytes(path: Path, step: int) -> tuple[int, list[int | None]]:
    """Where the last line of a step up to `step` ends, and the steps of the lines after it (None: cannot be read)."""
    kept = position = 0
    beyond: list[int | None] = []
    with path.open("rb") as lines:
        for line in lines:
            position += len(line)
            if not line.endswith(b"\n"):
                break
            found = (from_json(line) or {}).get("step")
            found = found if isinstance(found, int) else None
            if found is not None and found <= step:
                kept = position
                beyond.clear()
            else:
                beyond.append(found)
    return kept, beyond
