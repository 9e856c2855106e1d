"""A page of HTML that shows runs side by side: curves, languages, routing, data, settings and what they ran on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import megatron_lpr
from megatron_lpr.files.json_lines import utc_now
from megatron_lpr.reporting import html_page, pictures
from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.training.run_report import (
    ReportedRun,
    corpora_rows,
    data_facts,
    differing_settings,
    environment,
    token_rows,
)
from megatron_lpr.training.status_rows import status_rows, steps_done

_SMOOTHED = (
    "Long curves are smoothed; where they are few, the pale band behind them goes from the least to the most that the "
    "steps had. The pointer finds the values."
)
_FEWER = "Of {} languages those {} have pictures of their own here of which most was read; plot --svg draws all."
_LOAD = "Share of the routing slots that each expert got, at the last step that recorded all layers."
_SHARE = (
    "Share of the routing slots of each language that frozen experts got, at the first and the last step that recorded "
    "all layers."
)


def report(runs: Mapping[str, ReportedRun], results: Sequence[str] = ()) -> str:
    """The page of runs, by the names that tell them apart.

    Args:
        results: files of `evaluate`, the base model's first.

    Raises:
        UserError: a result that is none, or results that cannot be compared.
    """
    losses = html_page.pictures(_curves(runs, pictures.LOSS))
    sections = {
        "Overview": html_page.facts(list(runs), _side_by_side([_overview(run) for run in runs.values()])),
        pictures.LOSS: html_page.paragraph(_SMOOTHED) + _fewer(runs) + losses,
        "Languages": _languages(runs, results),
        "Routing": _routing(runs, results),
        "Expert load": _load(runs),
        "Data": "".join(map(_data, *zip(*runs.items(), strict=True))),
        "Settings": _settings(runs),
        pictures.OPTIMIZER: html_page.pictures(_curves(runs, pictures.OPTIMIZER)),
        pictures.SPEED: html_page.pictures(_curves(runs, pictures.SPEED)),
        "Environment": html_page.facts(
            list(runs), _side_by_side([environment(run) for run in runs.values()]), mark=True
        ),
    }
    title = ", ".join(runs) if len(runs) <= 4 else f"{len(runs)} runs"
    written = f"Written {utc_now()[:19]}Z by megatron-lpr {megatron_lpr.__version__}, from the files of the run" + (
        "s" if len(runs) > 1 else ""
    )
    return html_page.page(title, html_page.paragraph(written), sections)


def _curves(runs: Mapping[str, ReportedRun], section: str) -> Iterator[tuple[str, str]]:
    logs = {name: run.log for name, run in runs.items()}
    return pictures.curves(logs, section, pictures.most_read(logs.values()))


def _fewer(runs: Mapping[str, ReportedRun]) -> str:
    """What is said where not all languages have the pictures that others have."""
    languages = {language for run in runs.values() for language in run.tokens}
    if len(languages) <= pictures.MOST_LANGUAGES:
        return ""
    return html_page.paragraph(_FEWER.format(len(languages), pictures.MOST_LANGUAGES))


def _side_by_side(facts: Sequence[Mapping[str, str | None]]) -> dict[str, list[str | None]]:
    labels = dict.fromkeys(label for its in facts for label in its)
    return {label: [its.get(label) for its in facts] for label in labels}


def _overview(run: ReportedRun) -> dict[str, str | None]:
    status, model = run.status, run.section("model")
    experts = f"{model.get('num_experts')}, of which {model.get('num_frozen_experts')} frozen; top-{model.get('topk')}"
    return {
        "folder": status.run,
        "state": status.state,
        "started": run.files.start.get("time"),
        "step": steps_done(status),
        "tokens read": f"{sum(run.tokens.values()):,}",
        "base": model.get("base"),
        "starts from": model.get("load"),
        "experts": experts if model.get("num_experts") else None,
        "trained": str(run.section("train").get("trainable") or "").replace("_", " ") or None,
        **status_rows(status),
        "log": run.log.notes,
    }


def _languages(runs: Mapping[str, ReportedRun], results: Sequence[str]) -> str:
    """Held-out text during the runs, and what `evaluate` has found."""
    parts = [html_page.pictures(_curves(runs, pictures.HELD_OUT))]
    if rows := _validations(runs):
        parts.insert(0, html_page.heading("Held-out text during the run"))
        note = "Bits per byte, lower is better; kept: the base's bits by the model's, in percent."
        parts.insert(1, html_page.table(rows, 1) + html_page.paragraph(note))
    if results:
        from megatron_lpr.evaluation.compare import compared  # with torch
        from megatron_lpr.evaluation.tasks import is_task_result

        of_tasks = [file for file in results if is_task_result(file)]
        for title, files in (
            ("Evaluated models", [file for file in results if file not in of_tasks]),
            ("Benchmarks", of_tasks),
        ):
            if files:
                rows, note = compared(files)
                parts += [html_page.heading(title), html_page.table(rows, 3), html_page.paragraph(note)]
    return "".join(parts)


def _validations(runs: Mapping[str, ReportedRun]) -> list[list[str]]:
    columns: list[tuple[str, Mapping[str, float], str]] = []
    for name, run in runs.items():
        own = f"{name}, " if len(runs) > 1 else ""
        ends: list[StepMetrics] = run.log.validation_ends
        columns += [(f"{own}step {end['step']:,}", end["validation"]["bits_per_byte"], ".3f") for end in ends]
        if ends and (kept := ends[-1]["validation"].get("retention")):
            columns.append((f"{own}kept", kept, ".1f"))
    languages = dict.fromkeys(language for _, values, _ in columns for language in values)
    rows = [["language", *(title for title, _, _ in columns)]]
    for language in languages:
        cells = [format(values[language], kind) if language in values else "–" for _, values, kind in columns]
        rows.append([language, *cells])
    return rows if languages else []


def _routing(runs: Mapping[str, ReportedRun], results: Sequence[str]) -> str:
    curves = html_page.pictures(_curves(runs, pictures.ROUTING))
    parts = []
    for name, run in runs.items():
        own = pictures.most_read([run.log]) if len(runs) > 1 else None
        if maps := html_page.pictures(pictures.frozen_share(run.log, run.section("model"), own), wide=True):
            parts.append(html_page.heading(name) + maps if len(runs) > 1 else maps)
    if parts:
        parts.insert(0, html_page.paragraph(_SHARE))
    if results:
        parts += _evaluated_routing(runs, results)
    return "".join(parts) + curves


def _evaluated_routing(runs: Mapping[str, ReportedRun], results: Sequence[str]) -> list[str]:
    from megatron_lpr.evaluation.retention import EvaluationResult
    from megatron_lpr.evaluation.tasks import is_task_result

    found = [EvaluationResult.load(file) for file in results if not is_task_result(file)]
    top = max(pictures.largest_share(run.section("model")) for run in runs.values())
    maps = [("", pictures.of_result(f"{its.model}: held-out text", its.routing, top)) for its in found if its.routing]
    return (
        [html_page.heading("Evaluated models, on each held-out text"), html_page.pictures(maps, wide=True)]
        if maps
        else []
    )


def _load(runs: Mapping[str, ReportedRun]) -> str:
    parts = []
    for name, run in runs.items():
        own = pictures.most_read([run.log], len(runs))
        if maps := html_page.pictures(pictures.expert_load(run.log, run.section("model"), own), wide=True):
            parts.append(html_page.heading(name) + maps if len(runs) > 1 else maps)
    return "".join([html_page.paragraph(_LOAD), _fewer(runs), *parts]) if parts else ""


def _data(name: str, run: ReportedRun) -> str:
    tables = [html_page.table(rows, left) for rows, left in ((token_rows(run), 2), (corpora_rows(run), 3)) if rows]
    facts = html_page.facts([name], {label: [value] for label, value in data_facts(run).items()})
    return html_page.heading(name) + facts + "".join(tables)


def _settings(runs: Mapping[str, ReportedRun]) -> str:
    parts = []
    if len(runs) > 1:
        differing = html_page.facts(list(runs), differing_settings(list(runs.values())))
        parts.append(differing or html_page.paragraph("The recipes differ in nothing but their names and folders."))
    for name, run in runs.items():
        recipe = Path(run.folder) / "recipe.yaml"
        if recipe.is_file():
            parts.append(html_page.folded(f"All settings of {name}", recipe.read_text("utf-8", errors="replace")))
    return "".join(parts)
