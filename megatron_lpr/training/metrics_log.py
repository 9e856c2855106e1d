"""Every step's metrics: one JSON line in metrics.jsonl, and TensorBoard."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from torch.utils.tensorboard import SummaryWriter

from megatron_lpr.errors import UserError


class RouterMetrics(TypedDict):
    """What the routers did with the tokens of one language; lists run over the MoE layers, first to last."""

    frozen_share: list[float]  # share of the k*T routing slots that went to frozen experts
    p0: list[float]  # mean probability of the frozen experts
    load: list[list[float]]  # share of the slots of each expert, frozen ones first


class StepMetrics(TypedDict):
    """One optimizer step; losses are means over the global batch, in nats."""

    step: int  # 1 is the first
    steps: int  # of the whole run
    stage: str
    ntp_loss: float
    balance_loss: float | None  # mean over layers, without its coefficient; None where it is not computed
    lpr_loss: float | None  # the same
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # scored tokens of this step
    tokens_per_second: float
    tokens_per_language: dict[str, int]  # scored tokens since the start of the run
    seconds: float
    consumed_samples: int  # since the start of the run
    router: NotRequired[dict[str, RouterMetrics]]  # only in every `logging.router_every`th step


class MetricsLog:
    """Writes `folder`/metrics.jsonl and `folder`/tensorboard; one process of the run has one.

    A run that resumes after step `resumed_step` (0: a fresh run) drops what an earlier run logged beyond it,
    after its last checkpoint: no step is there twice.
    """

    def __init__(self, folder: str | Path, *, resumed_step: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            _keep_until(path, resumed_step)
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Log one step; its line is on its way to the disk when this returns."""
        self._lines.write(json.dumps(metrics, ensure_ascii=False, allow_nan=False) + "\n")
        self._lines.flush()
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
    path = Path(path)
    if not path.is_file():
        raise UserError(f"metrics {path}: no such file")
    with path.open(encoding="utf-8") as lines:
        return list(_records(path, lines))


def _records(path: Path, lines: Iterable[str]) -> Iterator[StepMetrics]:
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return  # the process died in the middle of its last line
        try:
            record = json.loads(line)
            record["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"metrics {path}, line {number}: not a step's record; move it away") from None
        yield record


def _keep_until(path: Path, step: int) -> None:
    kept = path.with_suffix(".jsonl.tmp")
    with path.open(encoding="utf-8") as lines, kept.open("w", encoding="utf-8") as out:
        for record in _records(path, lines):
            if record["step"] <= step:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(kept, path)


def _scalars(metrics: StepMetrics) -> Iterator[tuple[str, float]]:
    """TensorBoard tags and values; layers count from 0, as in the names of the parameters."""
    groups = {
        "loss": {"ntp": metrics["ntp_loss"], "balance": metrics["balance_loss"], "lpr": metrics["lpr_loss"]},
        "optimizer": {"grad_norm": metrics["grad_norm"], "lr": metrics["lr"]},
        "throughput": {key: metrics[key] for key in ("tokens_per_second", "seconds")},
        "data": {"tokens_per_step": metrics["tokens"], "consumed_samples": metrics["consumed_samples"]},
        "tokens": metrics["tokens_per_language"],
    }
    for group, values in groups.items():
        yield from ((f"{group}/{name}", value) for name, value in values.items() if value is not None)
    for language, router in metrics.get("router", {}).items():
        yield from _router_scalars(language, router)


def _router_scalars(language: str, router: RouterMetrics) -> Iterator[tuple[str, float]]:
    layers = zip(router["frozen_share"], router["p0"], router["load"], strict=True)
    for layer, (share, p0, load) in enumerate(layers):
        yield f"router/frozen_share/{language}/layer_{layer:02d}", share
        yield f"router/p0/{language}/layer_{layer:02d}", p0
        for expert, value in enumerate(load):
            yield f"router/load/{language}/layer_{layer:02d}/expert_{expert}", value
