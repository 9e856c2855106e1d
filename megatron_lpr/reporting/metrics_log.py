"""Every step's metrics: one JSON line in metrics.jsonl, and TensorBoard. docs/metrics.md says what each key means."""

from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from torch.utils.tensorboard import SummaryWriter

from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import JsonLines, complete_lines, from_json, utc_now
from megatron_lpr.reporting.abandoned_steps import set_aside


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


class StepMetrics(TypedDict):
    """One optimizer step; losses are means over the global batch, in nats."""

    step: int  # 1 is the first
    time: NotRequired[str]  # when the step had ended, UTC, ISO 8601; not in records of old versions
    steps: int  # of the whole run
    stage: str
    ntp_loss: float
    ntp_loss_per_language: NotRequired[dict[str, float]]  # of the languages that the step read; not in old records
    balance_loss: float | None  # mean over layers, without its coefficient; None where it is not computed
    lpr_loss: float | None  # the same
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # scored tokens of this step
    tokens_per_second: float
    tokens_per_language: dict[str, int]  # scored tokens since the start of the run
    seconds: float
    consumed_samples: int  # since the start of the run
    router_summary: NotRequired[dict[str, RouterSummary]]  # every `logging.router_every` steps
    router: NotRequired[dict[str, RouterMetrics]]  # every `logging.router_layers_every` steps, the first and the last


class MetricsLog:
    """Writes `folder`/metrics.jsonl and `folder`/tensorboard; one process of the run has one.

    A run that resumes after step `resumed_step` (0: a fresh run) goes on there: what an earlier one logged beyond it is
    moved aside, so that no step is there twice, and `moved` says so (None: there was nothing).
    """

    def __init__(self, folder: str | Path, *, resumed_step: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self.moved = set_aside(path, resumed_step) if path.exists() else None
        self._lines = JsonLines(path)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Log one step; its line is with the operating system when this returns."""
        self._lines.append({"step": metrics["step"], "time": utc_now()} | metrics)
        for tag, value in _scalars(metrics):
            self._board.add_scalar(tag, value, metrics["step"])

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[StepMetrics]:
    """All records of a metrics.jsonl.

    Raises:
        UserError: no such file, or a line that is no record.
    """
    return list(each_record(path))


def each_record(path: str | Path) -> Iterator[StepMetrics]:
    """The same one by one; a last line that a killed process has not finished is left out."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"metrics {path}: no such file")
    for number, line in enumerate(complete_lines(path), start=1):
        record = from_json(line)
        if record is None or "step" not in record:
            raise UserError(f"metrics {path}, line {number}: not a step's record; remove the line")
        yield record


def _scalars(metrics: StepMetrics) -> Iterator[tuple[str, float]]:
    """TensorBoard tags and values; layers and experts count from 0, as in the names of the parameters."""
    groups = {
        "loss": {"ntp": metrics["ntp_loss"], "balance": metrics["balance_loss"], "lpr": metrics["lpr_loss"]},
        "loss_per_language": metrics.get("ntp_loss_per_language", {}),
        "optimizer": {"grad_norm": metrics["grad_norm"], "lr": metrics["lr"]},
        "throughput": {key: metrics[key] for key in ("tokens_per_second", "seconds")},
        "data": {"tokens_per_step": metrics["tokens"], "consumed_samples": metrics["consumed_samples"]},
        "tokens": metrics["tokens_per_language"],
    }
    for group, values in groups.items():
        yield from ((f"{group}/{name}", value) for name, value in values.items() if value is not None)
    for language, summary in metrics.get("router_summary", {}).items():
        for statistic, over_layers in summary.items():
            yield from ((f"router_summary/{statistic}/{language}/{name}", value) for name, value in over_layers.items())
    for language, router in metrics.get("router", {}).items():
        yield from _router_scalars(language, router)


def _router_scalars(language: str, router: RouterMetrics) -> Iterator[tuple[str, float]]:
    layers = zip(router["frozen_share"], router["p0"], router["load"], strict=True)
    for layer, (share, p0, load) in enumerate(layers):
        yield f"router/frozen_share/{language}/layer_{layer:02d}", share
        yield f"router/p0/{language}/layer_{layer:02d}", p0
        for expert, value in enumerate(load):
            yield f"router/load/{language}/layer_{layer:02d}/expert_{expert}", value
