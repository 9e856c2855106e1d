"""`megatron-lpr report`: a page that shows runs."""

import argparse
from pathlib import Path

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import told_apart
from megatron_lpr.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "output folder of a run, or JSON result of evaluate (the base model's first)"
    parser.add_argument("sources", nargs="+", metavar="RUN_OR_RESULT", help=what)
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first run's folder)")


def run(options: argparse.Namespace) -> None:
    """Write one page of HTML, which needs nothing beside it, of runs that go on or have ended."""
    from megatron_lpr.files import durable
    from megatron_lpr.files.json_lines import writing
    from megatron_lpr.files.output_place import check_page
    from megatron_lpr.training.report_page import report
    from megatron_lpr.training.run_report import ReportedRun

    sources = list(dict.fromkeys(options.sources))
    results = [source for source in sources if Path(source).is_file()]
    folders = [source for source in sources if source not in results]
    if not folders:
        raise UserError("report: no run is named, only results; name the output folder of a run too, or use compare")
    out = Path(options.out or Path(folders[0]) / "report.html")
    check_page(out, "report.html")
    runs = {folder: ReportedRun.read(folder) for folder in folders}
    page = report(told_apart({folder: run.name for folder, run in runs.items()}, runs), results)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(out, page)
    print(out)


COMMAND = Command(
    "report",
    "a page of HTML of one run or several: curves, languages, routing, data, settings",
    add_arguments,
    run,
    place=14,
)
