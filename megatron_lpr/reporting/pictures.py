"""The pictures of runs: what is drawn of their logs, each with the name of its file."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_lpr.reporting.heat_map import heat_map
from megatron_lpr.reporting.line_chart import line_chart
from megatron_lpr.reporting.metrics_log import RouterMetrics
from megatron_lpr.reporting.run_log import Curve, RunLog


@dataclass(frozen=True)
class Panel:
    """A picture of one path of the logs (run_log.py), or one for each language."""

    section: str
    path: str
    file: str
    title: str
    unit: str
    log: bool = False
    level: float | None = None


MOST_LANGUAGES = 24  # of a page that have pictures of their own

LOSS, HELD_OUT, ROUTING, SPEED, OPTIMIZER = "Losses", "Held-out text", "Routing", "Speed and memory", "Optimizer"
PANELS = (
    Panel(LOSS, "ntp_loss", "ntp_loss", "Next-token prediction", "nats per token"),
    Panel(LOSS, "balance_loss", "balance_loss", "Load balance", "no unit; 1: every expert gets the same"),
    Panel(LOSS, "lpr_loss", "lpr_loss", "Language Priors Routing", "nats: mean of −ln p₀"),
    Panel(LOSS, "ntp_loss_per_language/*", "ntp_loss", "Next-token prediction", "nats per token"),
    Panel(HELD_OUT, "validation/bits_per_byte/*", "bits_per_byte", "Held-out text", "bits per byte; lower is better"),
    Panel(
        HELD_OUT, "validation/retention/*", "retention", "Kept of the base",
        "percent: bits of the base / of the model", level=100.0,
    ),
    Panel(
        ROUTING, "router_summary/*/frozen_share/mean", "frozen_share", "Slots in frozen experts",
        "share, mean over the layers",
    ),
    Panel(
        ROUTING, "router_summary/*/busiest_expert/mean", "busiest_expert", "Load of the busiest expert",
        "in equal shares, mean over the layers; 1: all the same", level=1.0,
    ),
    Panel(SPEED, "tokens_per_second", "tokens_per_second", "Speed", "tokens per second"),
    Panel(SPEED, "tflops_per_device", "tflops_per_device", "Executed operations", "TFLOP/s of a device"),
    Panel(SPEED, "mfu", "mfu", "Model FLOPs utilisation", "share of the peak"),
    Panel(SPEED, "ranks/memory_gb/max", "memory_gb", "Memory of the fullest rank", "GB"),
    Panel(OPTIMIZER, "grad_norm", "grad_norm", "Norm of the gradient", "before clipping", log=True),
    Panel(OPTIMIZER, "lr", "lr", "Learning rate", ""),
    Panel(OPTIMIZER, "router_lr", "router_lr", "Learning rate of the routers", ""),
)  # fmt: skip


def most_read(logs: Iterable[RunLog], parts: int = 1) -> list[str]:
    """The languages of which the runs have read most, as many as have pictures on a page, or on a part of so many.

    Nobody looks at thousands, which take hundreds of megabytes.
    """
    read: Counter[str] = Counter()
    for log in logs:
        if log.last is not None:
            read.update(log.last.get("tokens_per_language") or {})
        read.update(dict.fromkeys(log.curves["validation/bits_per_byte/*"], 0))
    return [language for language, _ in read.most_common(max(MOST_LANGUAGES // parts, 1))]


def curves(
    logs: Mapping[str, RunLog], section: str | None = None, languages: Sequence[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Names and pictures of the curves that some run has, all runs in one picture.

    Of several runs each language has its own picture, with a line for each run; of one run all languages share one.

    Args:
        languages: those that have pictures of their own; None: all.
    """
    for panel in PANELS:
        if section not in (None, panel.section):
            continue
        found = {run: log.curves[panel.path] for run, log in logs.items()}
        there = list(dict.fromkeys(language for its in found.values() for language in its))
        if len(logs) == 1 and there not in ([], [""]):
            (of_run,) = found.values()
            yield f"{panel.file}_per_language", _chart(panel, f"{panel.title}, by language", of_run)
            continue
        for language in there:
            if language and languages is not None and language not in languages:
                continue
            lines = {run: its.get(language) for run, its in found.items()}
            name = f"{panel.file}_{language}" if language else panel.file
            yield name, _chart(panel, f"{panel.title}: {language}" if language else panel.title, lines)


def _chart(panel: Panel, title: str, lines: Mapping[str, Curve | None]) -> str:
    return line_chart(title, panel.unit, lines, log=panel.log, level=panel.level)


def frozen_share(
    log: RunLog, model: Mapping[str, object], languages: Sequence[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Where each language's tokens go, at the first and the last step whose layers were recorded.

    Args:
        model: this section of the recipe.
        languages: of which; None: of all.
    """
    for moment, end in zip(("before", "after"), log.router_ends, strict=False):
        rows = {language: found["frozen_share"] for language, found in _chosen(end["router"], languages)}
        if not rows:
            continue
        title = f"{moment}: step {end['step']:,}"
        yield f"frozen_share_{moment}", heat_map(title, rows, top=largest_share(model), columns=_layers(rows, model))


def of_result(title: str, routing: Mapping[str, Sequence[float]], top: float) -> str:
    """The same on held-out texts, as `evaluate` has found it."""
    return heat_map(title, routing, top=top, columns=_layers(routing, {}))


def expert_load(
    log: RunLog, model: Mapping[str, object], languages: Sequence[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Share of the slots of each expert at the last step whose layers were recorded, a picture for each language."""
    for end in log.router_ends[-1:]:
        most = max(share for found in end["router"].values() for layer in found["load"] for share in layer)
        top = math.ceil(100 * most - 1e-6) / 100
        for language, found in _chosen(end["router"], languages):
            experts = range(max(map(len, found["load"])))
            frozen = model.get("num_frozen_experts", 1)
            rows = {
                f"expert {expert}" + (" (frozen)" if isinstance(frozen, int) and expert < frozen else ""): [
                    layer[expert] if expert < len(layer) else None for layer in found["load"]
                ]
                for expert in experts
            }
            columns = _layers({"": found["load"]}, model)
            title = f"{language}: step {end['step']:,}"
            yield f"load_{language}", heat_map(title, rows, top=top or 1.0, columns=columns)


def _chosen(
    router: Mapping[str, RouterMetrics], languages: Sequence[str] | None
) -> Iterator[tuple[str, RouterMetrics]]:
    return ((language, its) for language, its in router.items() if languages is None or language in languages)


def largest_share(model: Mapping[str, object]) -> float:
    """The largest possible share of slots in frozen experts: a token takes an expert once."""
    frozen, topk = model.get("num_frozen_experts", 1), model.get("topk", 2)
    return min(frozen, topk) / topk if isinstance(frozen, int) and isinstance(topk, int) and topk > 0 else 1.0


def _layers(rows: Mapping[str, Sequence[object]], model: Mapping[str, object]) -> list[int]:
    """Numbers of the layers that have experts, first to last."""
    without = model.get("mlp_only_layers") or ()
    numbers = (number for number in itertools.count() if not isinstance(without, list | tuple) or number not in without)
    return list(itertools.islice(numbers, max(map(len, rows.values()))))


def file_name(name: str) -> str:
    """The name of a picture as that of a file, whatever a language is called."""
    return re.sub(r"[^\w.-]+", "_", name)


def all_pictures(logs: Mapping[str, RunLog], models: Mapping[str, Mapping[str, object]]) -> Iterator[tuple[str, str]]:
    """Every picture of runs; those of one run alone begin with its name, if there are several."""
    yield from curves(logs)
    for run, log in logs.items():
        own = f"{run}_" if len(logs) > 1 else ""
        for name, picture in (*frozen_share(log, models[run]), *expert_load(log, models[run])):
            yield own + name, picture
