"""Every step's metrics: one JSON line in metrics.jsonl, and TensorBoard. docs/metrics.md says what each key means."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import JsonLines, complete_lines, from_json, utc_now, writing


class OverLayers(TypedDict):
    """A number of every MoE layer, in short."""

    mean: float
    min: float
    max: float


class RouterSummary(TypedDict):
    """What the routers did with the tokens of one language."""

    frozen_share: OverLayers  # share of the k*T routing slots that went to frozen experts
    p0: OverLayers  # mean probability of the frozen experts
    busiest_expert: OverLayers  # slots of the expert that got most, relative to an equal share; 1: all got the same


class RouterMetrics(TypedDict):
    """The same in full; lists run over the MoE layers, first to last."""

    frozen_share: list[float]
    p0: list[float]
    load: list[list[float]]  # share of the slots of each expert, frozen ones first


class SlowestRank(TypedDict):
    """Seconds until a rank has its own gradients, in the mean of some steps; `median` of the ranks of its stage."""

    median: float
    max: float
    rank: int
    host: str


class LargestRank(TypedDict):
    """Memory of a rank."""

    max: float
    rank: int
    host: str


class RanksRecord(TypedDict):
    """Which rank the others wait for, and which takes most memory."""

    compute_seconds: SlowestRank
    memory_gb: LargestRank


class ValidationRecord(TypedDict):
    """Held-out text after a step, by language."""

    bits_per_byte: dict[str, float]
    retention: NotRequired[dict[str, float]]  # of original languages: the base's bits by the model's, in percent


# Of one record, of every layer or expert: TensorBoard takes 0.1 ms for each and lists each tag, W&B likewise
MOST_LAYER_SCALARS = 20_000
_THROUGHPUT: tuple[Literal["tokens_per_second", "seconds", "tflops_per_device", "mfu"], ...]
_THROUGHPUT = ("tokens_per_second", "seconds", "tflops_per_device", "mfu")
# What may differ between two runs that compute the same
TIMING = frozenset({"time", "seconds", "tokens_per_second", "tflops_per_device", "mfu", "ranks", "validation_seconds"})


class StepMetrics(TypedDict):
    """One optimizer step; losses are means over the global batch, in nats."""

    step: int  # 1 is the first
    time: NotRequired[str]  # when the step had ended, UTC, ISO 8601; `MetricsLog` adds it
    steps: int  # of the whole run
    stage: str
    ntp_loss: float
    ntp_loss_per_language: dict[str, float]  # of the languages that the step read
    balance_loss: float | None  # mean over layers, without its coefficient; None where it is not computed
    lpr_loss: float | None  # the same
    grad_norm: float  # before clipping
    lr: float
    router_lr: NotRequired[float]  # of the routers, where it is another one (optimizer.router_lr)
    tokens: int  # scored tokens of this step
    tokens_per_second: float
    tokens_per_language: dict[str, int]  # scored tokens since the start of the run
    seconds: float
    tflops_per_device: NotRequired[float]  # executed, in the mean of the devices; in steps with router statistics
    mfu: NotRequired[float]  # what the model needs of them, as a share of the peak; where that is known
    ranks: NotRequired[RanksRecord]  # every `logging.stragglers_every` steps
    validation: NotRequired[ValidationRecord]  # every `evaluation.every` steps
    validation_seconds: NotRequired[float]  # that it took; no part of `seconds`
    consumed_samples: int  # since the start of the run
    skipped_steps: int  # the same
    skipped: NotRequired[str]  # why this step has changed no weight, where it has not
    router_summary: NotRequired[dict[str, RouterSummary]]  # every `logging.router_every` steps
    router: NotRequired[dict[str, RouterMetrics]]  # every `logging.router_layers_every` steps, the first and the last


class MetricsLog:
    """Writes `folder`/metrics.jsonl and `folder`/tensorboard; one process of the run has one.

    A run that resumes after step `resumed_step` (0: a fresh run) goes on there: what an earlier one logged beyond it is
    moved aside, so that no step is there twice, and `moved` says so (None: there was nothing).
    """

    def __init__(self, folder: str | Path, *, resumed_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds, and who reads metrics need not wait

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self.moved = _set_aside(path, resumed_step) if path.exists() else None
        self._lines = JsonLines(path)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Log one step; its line is with the operating system when this returns."""
        self._lines.append({"step": metrics["step"], "time": utc_now()} | metrics)
        for tag, value in scalars(metrics):
            self._board.add_scalar(tag, value, metrics["step"])

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(path: str | Path) -> list[StepMetrics]:
    """All records of a metrics.jsonl; a last line that a killed process has not finished is left out.

    Raises:
        UserError: no such file, or a line that is no record.
    """
    path, records = Path(path), []
    if not path.is_file():
        raise UserError(f"metrics {path}: no such file")
    for number, line in enumerate(complete_lines(path), start=1):
        record = from_json(line)
        if record is None or "step" not in record:
            raise UserError(f"metrics {path}, line {number}: not a step's record; remove the line")
        records.append(cast(StepMetrics, record))
    return records


def _set_aside(path: Path, step: int) -> str | None:
    """Move the lines of later steps than `step`, a future that will not happen, to metrics.abandoned-<time>.jsonl.

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


def scalars(metrics: StepMetrics) -> Iterator[tuple[str, float]]:
    """Tags and values, as TensorBoard and others take them; what is not finite, as in a skipped step, is left out.

    So are the layers', or the experts', where a record has more than `MOST_LAYER_SCALARS` of them.

    Layers and experts count from 0, as in the names of the parameters.
    """
    return ((tag, value) for tag, value in _scalars(metrics) if math.isfinite(value))


def _scalars(metrics: StepMetrics) -> Iterator[tuple[str, float]]:
    groups: dict[str, Mapping[str, float | None]] = {
        "loss": {"ntp": metrics["ntp_loss"], "balance": metrics["balance_loss"], "lpr": metrics["lpr_loss"]},
        "loss_per_language": metrics["ntp_loss_per_language"],
        "optimizer": {name: metrics[name] for name in ("grad_norm", "lr", "router_lr") if name in metrics},
        "throughput": {key: metrics[key] for key in _THROUGHPUT if key in metrics},
        "data": {"tokens_per_step": metrics["tokens"], "consumed_samples": metrics["consumed_samples"]},
        "tokens": metrics["tokens_per_language"],
    }
    if ranks := metrics.get("ranks"):
        slowest, largest = ranks["compute_seconds"], ranks["memory_gb"]
        groups["ranks"] = {
            "compute_seconds_max": slowest["max"],
            "compute_seconds_median": slowest["median"],
            "memory_gb_max": largest["max"],
        }
    if validation := metrics.get("validation"):
        groups["validation/bits_per_byte"] = validation["bits_per_byte"]
        groups["validation/retention"] = validation.get("retention", {})
    for group, values in groups.items():
        yield from ((f"{group}/{name}", value) for name, value in values.items() if value is not None)
    summaries = cast(Mapping[str, Mapping[str, Mapping[str, float]]], metrics.get("router_summary", {}))
    for language, summary in summaries.items():
        for statistic, over_layers in summary.items():
            yield from ((f"router_summary/{statistic}/{language}/{name}", value) for name, value in over_layers.items())
    yield from _router_scalars(metrics.get("router", {}))


def _router_scalars(router: Mapping[str, RouterMetrics]) -> Iterator[tuple[str, float]]:
    """Of every layer, and of every expert, unless these are more than anyone can look at: metrics.jsonl has them."""
    if sum(2 * len(its["p0"]) for its in router.values()) <= MOST_LAYER_SCALARS:
        for language, its in router.items():
            for layer, (share, p0) in enumerate(zip(its["frozen_share"], its["p0"], strict=True)):
                yield f"router/frozen_share/{language}/layer_{layer:02d}", share
                yield f"router/p0/{language}/layer_{layer:02d}", p0
    if sum(map(len, (load for its in router.values() for load in its["load"]))) <= MOST_LAYER_SCALARS:
        for language, its in router.items():
            for layer, load in enumerate(its["load"]):
                for expert, value in enumerate(load):
                    yield f"router/load/{language}/layer_{layer:02d}/expert_{expert}", value
