"""How a run does, from the files in its output folder alone: no torch, no process that is asked, in a moment.

A run is `running` while a process holds its folder, `stale` where that process has written nothing for long,
`finished`, `stopped` (it was asked to) or `failed`: with its reason, or without a word, as when it was killed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

from megatron_lpr.checkpoint.run_state import file_of_another_size, find_checkpoint, step_of
from megatron_lpr.errors import UserError
from megatron_lpr.files.locks import holder_of
from megatron_lpr.reporting.sound_record import sound_record
from megatron_lpr.training.run_files import CUT, RunFiles, last_lines, last_validation

State = Literal["running", "stale", "finished", "stopped", "failed"]
LOSSES = ("ntp_loss", "balance_loss", "lpr_loss")
_TAIL_STEPS = 100
_PATIENCE_SECONDS, _PATIENCE_STEPS = 600.0, 20


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Times are UTC, ISO 8601; None: not known, or there is none."""

    run: str  # its output folder
    name: str | None
    state: State
    reason: str | None  # of a state that is not as it should be
    step: int
    steps: int | None
    eta_seconds: float | None  # of a run that goes on
    losses: dict[str, float]  # of the last step that has some
    trend: float | None  # of ntp_loss: mean of the newer half of the last `trend_steps` less that of the older half
    trend_steps: int
    seconds_per_step: float | None  # between the ends of steps, with all that happens there
    tokens_per_second: float | None
    tflops_per_device: float | None
    mfu: float | None
    skipped_steps: int
    checkpoint: str | None  # the one that the run goes on from
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    checkpoint_fault: str | None  # what is wrong with those that are there
    last_record: str | None
    last_record_age_seconds: float | None
    held_by: dict[str, Any] | None  # host, pid, slurm_job, since
    slowest_rank: dict[str, Any] | None  # of the last record that has one
    validation: dict[str, Any] | None  # the last one: step, bits_per_byte, retention
    damaged_lines: int  # near the end of metrics.jsonl, no steps' records: left out
    faults: list[str]  # what else is left out and why, of the files of the run


def run_status(run: str, now: datetime | None = None) -> RunStatus:
    """Look into the output folder of a run.

    Raises:
        UserError: it is none, or a file in it is damaged.
    """
    return status_of(run, RunFiles.read(run), now)


def status_of(run: str, files: RunFiles, now: datetime | None = None) -> RunStatus:
    """The same where some of its files have been read."""
    folder, now = Path(run), now or datetime.now(UTC)
    lines, is_cut = last_lines(folder / "metrics.jsonl", _TAIL_STEPS)
    found = [sound_record(line, layers=False) for line in lines]
    records = [cast(dict[str, Any], record) for record in found if record is not None]
    last = records[-1] if records else {}
    since = files.start.get("time", "")
    fresh = [record for record in records if str(record.get("time", "")) > since]
    seconds = _seconds_per_step(fresh or records)
    checkpoint = _checkpoint(run, now)
    held_by = holder_of(run)
    planned = files.section("train").get("steps")  # by the newest start, which may have raised it
    steps = fresh[-1].get("steps", planned) if fresh else planned or last.get("steps")
    saved = checkpoint["checkpoint_step"] or 0
    step = max(int(last.get("step", 0)), saved)
    signs = [since, str((fresh or [{}])[-1].get("time", ""))]
    silence = min((age for age in (_age(sign, now) for sign in signs) if age is not None), default=None)
    state, reason = _state(held_by, files.ends, silence, seconds, is_done=steps is not None and saved >= steps)
    if state == "stopped" and not reason:
        reason = _text(folder / "stopped")
    eta = (steps - step) * seconds if state == "running" and steps is not None and seconds is not None else None
    scored = [record for record in records if record.get("ntp_loss") is not None]
    newest = scored[-1] if scored else {}
    return RunStatus(
        run=run,
        name=last.get("stage") or files.settings.get("name"),
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        eta_seconds=eta,
        losses={key: newest[key] for key in LOSSES if newest.get(key) is not None},
        trend=_trend([record["ntp_loss"] for record in scored]),
        trend_steps=len(scored),
        seconds_per_step=seconds,
        tokens_per_second=last.get("tokens_per_second"),
        tflops_per_device=last.get("tflops_per_device"),
        mfu=last.get("mfu"),
        skipped_steps=last.get("skipped_steps", 0),
        **checkpoint,
        last_record=last.get("time"),
        last_record_age_seconds=_age(str(last.get("time", "")), now),
        held_by=held_by,
        slowest_rank=next((r["ranks"]["compute_seconds"] for r in reversed(records) if r.get("ranks")), None),
        validation=last_validation(folder / "metrics.jsonl") if files.section("evaluation").get("every") else None,
        damaged_lines=found.count(None),
        faults=[*files.faults, *([f"metrics.jsonl: {CUT}"] if is_cut else [])],
    )


def _state(
    held_by: Mapping[str, Any] | None,
    told: Sequence[Mapping[str, Any]],
    silence: float | None,
    seconds: float | None,
    *,
    is_done: bool,
) -> tuple[State, str | None]:
    """told: the ends since the newest start; silence: seconds since a sign of life; is_done: the last step is saved."""
    if held_by is not None:
        patience = max(_PATIENCE_SECONDS, _PATIENCE_STEPS * (seconds or 0.0))
        if silence is None or silence < patience:
            return "running", None
        return "stale", f"a process holds the run and has written nothing for {silence / 60:.0f} minutes"
    if told:
        end = next((end for end in told if end.get("outcome") == "failed"), told[-1])  # the first is the cause
        return end.get("outcome", "failed"), end.get("reason")
    if is_done:
        return "finished", None
    return "failed", "no process holds the run, and it has ended without a word: killed, or its machine went down"


def _checkpoint(run: str, now: datetime) -> dict[str, Any]:
    keys = ("checkpoint", "checkpoint_step", "checkpoint_age_seconds", "checkpoint_fault")
    found: dict[str, Any] = dict.fromkeys(keys)
    try:
        damaged: dict[str, str] = {}
        while (there := find_checkpoint(run, damaged)) and (fault := file_of_another_size(there.folder)):
            damaged[there.folder.name] = fault
        if there:
            written = datetime.fromtimestamp((there.folder / "run.json").stat().st_mtime, UTC)
            age = max((now - written).total_seconds(), 0.0)
            found |= {"checkpoint": str(there.folder), "checkpoint_step": step_of(there.folder)}
            found |= {"checkpoint_age_seconds": age, "checkpoint_fault": there.note}
    except (UserError, FileNotFoundError) as error:  # the run may delete one that was just there
        found["checkpoint_fault"] = str(error)
    return found


def _seconds_per_step(records: Sequence[Mapping[str, Any]]) -> float | None:
    """By the times of the records, or of a single one its own duration."""
    timed = [record for record in records if _moment(str(record.get("time", "")))]
    if len(timed) < 2:
        return records[-1].get("seconds") if records else None
    first, last = timed[0], timed[-1]
    between = _moment(last["time"]) - _moment(first["time"])  # type: ignore[operator]
    return max(between.total_seconds() / max(last["step"] - first["step"], 1), 0.0)


def _trend(losses: Sequence[float]) -> float | None:
    half = len(losses) // 2
    return fmean(losses[-half:]) - fmean(losses[:half]) if half else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _moment(time: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def _age(time: str, now: datetime) -> float | None:
    moment = _moment(time)
    return max((now - moment).total_seconds(), 0.0) if moment else None
