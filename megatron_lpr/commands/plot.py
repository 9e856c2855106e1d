"""`megatron-lpr plot`: pictures of runs and of evaluation results."""

import argparse
from pathlib import Path

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import told_apart
from megatron_lpr.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "output folder of a run, whose losses are drawn, or JSON result of evaluate, whose routing is"
    parser.add_argument("sources", nargs="+", metavar="RUN_OR_RESULT", help=what)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder for losses.png and frozen_share.png")
    what = "draw each picture of report that belongs to the runs, as an SVG file of its own, in place of losses.png"
    parser.add_argument("--svg", action="store_true", help=what)
    share = "largest possible share of frozen experts, top of the colours: frozen experts / top-k (default: 1)"
    parser.add_argument("--max-share", metavar="SHARE", type=float, help=share)


def run(options: argparse.Namespace) -> None:
    """Draw the losses of all runs in one picture (or all that `report` has), and the routing of results in another."""
    runs = [source for source in options.sources if Path(source).is_dir()]
    results = [source for source in options.sources if source not in runs]
    if not results and options.max_share is not None:
        raise UserError(f"--max-share {options.max_share}: has no effect without an evaluation result")
    if options.max_share is not None and not 0 < options.max_share <= 1:
        raise UserError(f"--max-share {options.max_share}: a share, above 0 and at most 1")
    if options.svg and not runs:
        raise UserError("--svg: has no effect without a run; name its output folder")
    out = Path(options.out)
    if out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    if runs and options.svg:
        _pictures(runs, out)
    elif runs:
        _losses(runs, out / "losses.png")
    if results:
        _frozen_share(results, out / "frozen_share.png", options.max_share or 1.0)


def _losses(runs: list[str], path: Path) -> None:
    from megatron_lpr.reporting.metrics_log import read_metrics
    from megatron_lpr.reporting.plots import plot_losses

    records = {run: read_metrics(Path(run) / "metrics.jsonl") for run in dict.fromkeys(runs)}
    names = {run: lines[-1].get("stage", run) if lines else run for run, lines in records.items()}
    plot_losses(told_apart(names, records), path)
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


def _frozen_share(results: list[str], path: Path, max_share: float) -> None:
    from megatron_lpr.evaluation.retention import EvaluationResult
    from megatron_lpr.reporting.plots import plot_frozen_share

    loaded = {file: EvaluationResult.load(file) for file in dict.fromkeys(results)}
    for file, result in loaded.items():
        if not result.routing:
            raise UserError(
                f"evaluation result {file}: says nothing of routing, as those of models without experts and of Hugging "
                "Face models; leave it out"
            )
    names = {file: result.model for file, result in loaded.items()}
    shares = {file: result.routing for file, result in loaded.items()}
    plot_frozen_share(told_apart(names, shares), path, max_share=max_share)
    print(path)


COMMAND = Command(
    "plot",
    "pictures: the losses of runs, and where evaluated models send the tokens of each held-out text",
    add_arguments,
    run,
    place=10,
)
