"""What the files of a run say of it, for a report: its log, recipe, starts, data and what it runs on; without torch."""

import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lpr.checkpoint.run_state import find_checkpoint, read_run_state
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.reading import flat, from_tree
from megatron_lpr.recipe.settings import DataConfig, TrainConfig
from megatron_lpr.reporting.run_log import RunLog, read_log
from megatron_lpr.training.run_files import RunFiles
from megatron_lpr.training.run_status import RunStatus, status_of

_MOST_CORPORA = 200  # of the table


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run, whatever state it is in."""

    folder: str
    status: RunStatus
    log: RunLog
    files: RunFiles

    @staticmethod
    def read(folder: str) -> "ReportedRun":
        """Raises UserError where it is no run, has no metrics, or a file of it is damaged."""
        metrics = Path(folder) / "metrics.jsonl"
        log = read_log(metrics) if metrics.is_file() else None  # which names the line that is damaged
        files = RunFiles.read(folder)
        status = status_of(folder, files)
        if log is None:
            raise UserError(f"run {folder}: no metrics yet (no metrics.jsonl); wait until it has made a step")
        return ReportedRun(folder=folder, status=status, log=log, files=files)

    @property
    def name(self) -> str:
        return str(self.status.name or self.folder)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe, what is sound of it; {} where there is none."""
        return self.files.section(name)

    @property
    def settings(self) -> dict[str, str]:
        """Every setting by its dotted name; things that have names, as corpora, stand under them."""
        found = flat(_named(self.files.recipe))
        return {key: value if isinstance(value, str) else _json(value) for key, value in found.items()}

    @cached_property
    def manifest(self) -> Manifest | UserError:
        """Of its corpora, or why it cannot be read: it may be gone, or on another machine."""
        path = str(self.section("data").get("manifest", ""))
        here = Path(str(self.files.start.get("working_folder", ""))) / path
        try:
            return _manifest(str(here if here.is_file() else path))
        except UserError as error:
            return error

    @cached_property
    def epochs(self) -> dict[str, tuple[float, float]] | UserError:
        """How often each corpus, or what is read of it, is passed over: so far, and by the whole run.

        Or why that cannot be told: it takes the corpora, and a recipe of this version.
        """
        if isinstance(self.manifest, UserError):
            return self.manifest
        try:
            data = from_tree(DataConfig, self.files.recipe.get("data", {}), f"data of {self.folder}")
            train = from_tree(TrainConfig, self.files.recipe.get("train", {}), f"train of {self.folder}")
            sampler = ReplaySampler.of(self.manifest, data, train.seed)
        except UserError as error:
            return error
        assert self.log.last is not None
        whole = train.steps * train.global_batch_size
        so_far = min(self.log.last.get("consumed_samples", 0), whole)
        passes = zip(sampler.epochs_before(so_far), sampler.epochs_before(whole), strict=True)
        return {corpus.name: its for corpus, its in zip(self.manifest.corpora, passes, strict=True)}

    @property
    def roles(self) -> dict[str, str]:
        """Of languages, as the manifest tells, or without it the recipe."""
        if isinstance(self.manifest, Manifest):
            return dict(self.manifest.language_roles)
        corpora = [corpus for name in ("evaluation", "preprocess") for corpus in self.section(name).get("corpora", ())]
        return {str(corpus.get("language")): str(corpus.get("role")) for corpus in corpora}

    @property
    def tokens(self) -> dict[str, int]:
        """That were read of each language, so far."""
        assert self.log.last is not None
        return self.log.last.get("tokens_per_language") or {}

    @property
    def stage1_tokens(self) -> int | None:
        """Of the run whose weights this one began with; None: not known."""
        own: int | None = self.section("data").get("replay", {}).get("stage1_tokens")
        if own:
            return own
        try:
            found = find_checkpoint(self.folder)
            source = read_run_state(found.folder).source if found else None
        except UserError:  # the overview tells
            return None
        return (source or {}).get("tokens")


def _manifest(path: str) -> Manifest:
    """Read once for all runs of a page that have it: thousands of corpora take a second."""
    try:
        return _manifest_as_of(path, os.stat(path).st_mtime_ns)
    except OSError:
        return Manifest.load(path, check_files=False)  # which says what is wrong


@functools.lru_cache(maxsize=8)
def _manifest_as_of(path: str, changed: int) -> Manifest:
    return Manifest.load(path, check_files=False)


def mixture(run: ReportedRun) -> Iterator[str]:
    """What is read in which share, from the first sample on; one text for each change."""
    data = run.section("data")
    entries = list(data.get("schedule", ()))
    if not entries or entries[0]["from_sample"]:
        entries.insert(0, {"from_sample": 0})
    for entry in entries:
        wanted = entry.get("mixture") or data.get("mixture") or {}
        total = sum(wanted.values()) or 1
        shares = ", ".join(f"{role} {_percent(share / total)}" for role, share in wanted.items())
        weights = ", ".join(f"{name} {weight:g}" for name, weight in (entry.get("weights") or {}).items())
        what = "; ".join([*([shares] if shares else []), *([f"weights {weights}"] if weights else [])])
        if what:
            yield f"from sample {entry['from_sample']:,}: {what}" if len(entries) > 1 else what


def data_facts(run: ReportedRun) -> dict[str, str | None]:
    """The plan of what a run reads, from its recipe."""
    data, train = run.section("data"), run.section("train")
    steps, samples, window = train.get("steps"), train.get("global_batch_size"), data.get("seq_length")
    size = None
    if steps and samples and window:
        size = f"{steps:,} steps × {samples:,} samples × {window:,} positions = {steps * samples * window:,}"
    own = isinstance(run.manifest, Manifest)
    return {
        "reads": size,
        "windows": data.get("windows"),
        "mixture": "; ".join(mixture(run)) or None,
        "replayed so far": _replayed(run),
        "replay": _replay_limits(data.get("replay", {})),
        "manifest": f"{data.get('manifest')}" + ("" if own else f" (cannot be read here: {run.manifest})"),
        "tokenizer": run.manifest.tokenizer.name if isinstance(run.manifest, Manifest) else None,
        "epochs": f"cannot be told here: {run.epochs}" if own and isinstance(run.epochs, UserError) else None,
    }


def corpora_rows(run: ReportedRun) -> list[list[str]]:
    """A table of the corpora there are, with the epochs that the run makes of each; [] without their manifest.

    Of thousands those with most tokens, in a page that shows many runs.
    """
    if not isinstance(run.manifest, Manifest):
        return []
    epochs = {} if isinstance(run.epochs, UserError) else run.epochs
    titles = ["epochs so far", "of the whole run"] if epochs else []
    rows = [["corpus", "language", "role", "weight", "documents", "tokens", *titles]]
    corpora = sorted(run.manifest.corpora, key=lambda corpus: -corpus.tokens)[:_MOST_CORPORA]
    largest = {corpus.name for corpus in corpora}
    for corpus in run.manifest.corpora:
        if corpus.name not in largest:
            continue
        counts = [f"{corpus.weight:g}", f"{corpus.documents:,}", f"{corpus.tokens:,}"]
        passes = [f"{its:.3f}" for its in epochs.get(corpus.name, ())]
        rows.append([corpus.name, corpus.language, corpus.role, *counts, *passes])
    if left := len(run.manifest.corpora) - len(corpora):
        rows.append([f"and {left:,} smaller ones", *[""] * (len(rows[0]) - 1)])
    return rows


def token_rows(run: ReportedRun) -> list[list[str]]:
    """A table of what the run has read of each language."""
    total, roles = sum(run.tokens.values()) or 1, run.roles
    rows = [["language", "role", "tokens read", "share"]]
    return rows + [[name, roles.get(name, "–"), f"{n:,}", _percent(n / total)] for name, n in run.tokens.items()]


def differing_settings(runs: Sequence[ReportedRun]) -> dict[str, list[str | None]]:
    """Those that are not the same in all runs, but for their names and folders; None: a recipe does not have it."""
    settings = [run.settings for run in runs]
    names = dict.fromkeys(itertools.chain(*settings))
    rows = {name: [its.get(name) for its in settings] for name in names if name not in ("name", "output")}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def environment(run: ReportedRun) -> dict[str, str | None]:
    """Where and with what a run was last started."""
    start, sizes = run.files.start, run.section("parallel")
    ranks = start.get("world_size")
    spread = [sizes.get(name, 1) for name in ("tensor", "pipeline", "context")]
    layout = [f"{name.replace('_', ' ')} {size}" for name, size in sizes.items() if type(size) is int and size > 1]
    if ranks:
        layout.append(f"data {ranks // (spread[0] * spread[1] * spread[2])}")
    facts = {
        "goes on after step": f"{start['step']:,}" if start.get("step") else None,
        "ranks": ranks and f"{ranks:,}",
        "hosts": ", ".join(map(str, start.get("hosts", ()))) or None,
        "device": start.get("device"),
        "layout": ", ".join(layout) or None,
        "dtype": run.section("model").get("dtype"),
        "Slurm job": start.get("slurm_job_id"),
        "command": start.get("command"),
        "working folder": start.get("working_folder"),
        "commit": start.get("git"),
    }
    return facts | start.get("versions", {})


def _replayed(run: ReportedRun) -> str | None:
    roles, total = run.roles, sum(run.tokens.values())
    replayed = sum(count for language, count in run.tokens.items() if roles.get(language) == "original")
    if not replayed:
        return None
    told = f"{replayed:,} tokens of original languages, {_percent(replayed / total)} of what the run has read"
    if stage1 := run.stage1_tokens:
        told += f", {_percent(replayed / stage1)} of stage 1's {stage1:,}"
    return told


def _replay_limits(replay: Mapping[str, Any]) -> str | None:
    parts = [f"at most {_percent(replay['max_share'])} of stage 1's tokens"] if "max_share" in replay else []
    parts += [f"{count:,} documents of {name}" for name, count in (replay.get("documents") or {}).items()]
    parts += [f"{_percent(share)} of the tokens of {name}" for name, share in (replay.get("tokens") or {}).items()]
    return ", ".join(parts) or None


def _named(tree: Any) -> Any:
    """Lists of things that have a name as mappings from it; all keys as text."""
    if isinstance(tree, dict):
        return {str(key): _named(value) for key, value in tree.items()}
    if isinstance(tree, list) and tree and all(isinstance(item, dict) and "name" in item for item in tree):
        return {str(item["name"]): _named({key: item[key] for key in item if key != "name"}) for item in tree}
    if isinstance(tree, list):
        return [_named(item) for item in tree]
    return tree


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
