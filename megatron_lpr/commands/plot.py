"""`megatron-lpr plot`: pictures of runs and of evaluation results."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import told_apart
from megatron_lpr.errors import UserError

if TYPE_CHECKING:
    from megatron_lpr.evaluation.retention import EvaluationResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "output folder of a run, whose losses are drawn, or JSON result of evaluate, whose routing is"
    parser.add_argument("sources", nargs="+", metavar="RUN_OR_RESULT", help=what)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder for the pictures")
    svg = "of runs each picture that report has, as an SVG file of its own, in place of losses.png"
    parser.add_argument("--svg", action="store_true", help=svg)
    base = "JSON result of the base: draws the retention of the results against their gain"
    parser.add_argument("--base", metavar="RESULT", help=base)
    replayed = "with --base: original languages that were replayed, which get points of their own"
    parser.add_argument("--replayed", metavar="LANGUAGE[,LANGUAGE...]", help=replayed)
    share = "largest possible share of frozen experts, top of the colours: frozen experts / top-k (default: 1)"
    parser.add_argument("--max-share", metavar="SHARE", type=float, help=share)


def run(options: argparse.Namespace) -> None:
    """Draw the losses of runs, and of evaluated models the routing and, beside the base, what they learned and kept."""
    from megatron_lpr.evaluation.retention import EvaluationResult

    runs = [source for source in options.sources if Path(source).is_dir()]
    results = {source: EvaluationResult.load(source) for source in options.sources if source not in runs}
    _check(options, bool(results))
    if options.svg and not runs:
        raise UserError("--svg: has no effect without a run; name its output folder")
    out = Path(options.out)
    if runs and options.svg:
        _pictures(runs, out)
    elif runs:
        _losses(runs, out / "losses.png")
    if options.base is not None:
        _retention_against_gain(options.base, results, options.replayed, out / "retention_against_gain.png")
    if results:
        _routing(results, options, out)


def _check(options: argparse.Namespace, has_results: bool) -> None:
    for option, value in (("--max-share", options.max_share), ("--base", options.base)):
        if value is not None and not has_results:
            raise UserError(f"{option} {value}: has no effect without an evaluation result")
    if options.max_share is not None and not 0 < options.max_share <= 1:
        raise UserError(f"--max-share {options.max_share}: a share, above 0 and at most 1")
    if options.replayed is not None and options.base is None:
        raise UserError(f"--replayed {options.replayed}: has no effect without --base")
    if Path(options.out).is_file():
        raise UserError(f"--out {options.out}: is a file; name a folder")


def _losses(runs: list[str], path: Path) -> None:
    from megatron_lpr.reporting.plots import plot_losses
    from megatron_lpr.reporting.run_log import read_log

    logs = {run: read_log(Path(run) / "metrics.jsonl") for run in dict.fromkeys(runs)}
    names = {run: log.last.get("stage", run) if log.last else run for run, log in logs.items()}
    plot_losses(told_apart(names, logs), path)
    print(path)


def _pictures(folders: list[str], out: Path) -> None:
    from megatron_lpr.files.json_lines import writing
    from megatron_lpr.reporting.pictures import all_pictures, file_name
    from megatron_lpr.reporting.svg import as_file
    from megatron_lpr.training.run_report import ReportedRun

    runs = {folder: ReportedRun.read(folder) for folder in dict.fromkeys(folders)}
    named = told_apart({folder: run.name for folder, run in runs.items()}, runs)
    models = {name: run.section("model") for name, run in named.items()}
    for name, picture in all_pictures({name: run.log for name, run in named.items()}, models):
        path = out / f"{file_name(name)}.svg"
        with writing(path):
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(as_file(picture), encoding="utf-8")
        print(path)


def _retention_against_gain(
    base: str, results: Mapping[str, "EvaluationResult"], replayed: str | None, path: Path
) -> None:
    from megatron_lpr.evaluation.gain import arms
    from megatron_lpr.evaluation.retention import EvaluationResult
    from megatron_lpr.reporting.gain_plot import plot_retention_against_gain

    named = told_apart({file: result.model for file, result in results.items()}, results)
    renamed = [dataclasses.replace(result, model=name) for name, result in named.items()]
    languages = replayed.split(",") if replayed else []
    plot_retention_against_gain(arms([EvaluationResult.load(base), *renamed], replayed=languages), path)
    print(path)


def _routing(results: Mapping[str, "EvaluationResult"], options: argparse.Namespace, out: Path) -> None:
    """Both pictures of routing; with --base some results, or all, may say nothing of it."""
    from megatron_lpr.reporting.plots import plot_frozen_share, plot_routing

    top = options.max_share or 1.0
    for file, result in results.items():
        if not result.routing and options.base is None:
            raise UserError(
                f"evaluation result {file}: says nothing of routing, as those of models without experts and of Hugging "
                "Face models; leave it out"
            )
    if not any(result.routing for result in results.values()):
        return
    names = {file: result.model for file, result in results.items()}
    shares = told_apart(names, {file: result.routing for file, result in results.items()})
    base: Mapping[str, Mapping[str, Sequence[float]]] = (
        {} if options.base is None else {"": {}}
    )  # it has the first colour
    plot_frozen_share({name: share for name, share in shares.items() if share}, out / "frozen_share.png", max_share=top)
    plot_routing({**base, **shares}, out / "routing.png", max_share=top)
    print(out / "frozen_share.png", out / "routing.png", sep="\n")


COMMAND = Command(
    "plot",
    "pictures: losses of runs; of evaluated models retention against gain, and where they send the tokens of each text",
    add_arguments,
    run,
    place=13,
)
