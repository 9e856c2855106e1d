"""What was done to a model, as its checkpoint and the files of its run tell it: for the model card."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lpr.checkpoint.run_state import RunState, checkpoint_folder, read_run_state
from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import complete_lines, from_json
from megatron_lpr.reporting.sound_record import sound_record


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """Training text; `digest` is the SHA-256 of its tokens on disk, `languages` are those in it, with their roles."""

    name: str
    role: str
    languages: dict[str, str]
    tokens: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run. losses: of its last step, by name, those that were computed."""

    name: str
    trainable: str
    steps: int
    samples: int
    objective: str
    losses: dict[str, float]
    tokens_per_language: dict[str, int]
    corpora: tuple[TrainingText, ...]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a model came about; stages in the order in which they were run."""

    stages: tuple[Stage, ...] = ()

    def languages(self, role: str) -> list[str]:
        """Languages of the training data that have this role, in order of appearance."""
        corpora = [corpus for stage in self.stages for corpus in stage.corpora]
        roles = [item for corpus in corpora for item in corpus.languages.items()]
        return list(dict.fromkeys(language for language, own in roles if own == role))


def read_provenance(checkpoint: Path) -> Provenance:
    """Of a checkpoint, and of those that its run and the runs before it started from, as far as they are there."""
    stages = [_stage(folder, state) for folder, state in _lineage(checkpoint) if state.recipe["train"]]
    return Provenance(stages=tuple(reversed(stages)))


def _lineage(checkpoint: Path) -> Iterator[tuple[Path, RunState]]:
    seen: set[Path] = set()
    folder: Path | None = checkpoint
    while folder is not None and folder.resolve() not in seen:
        seen.add(folder.resolve())
        state = read_run_state(folder)
        yield folder, state
        load = state.recipe["model"]["load"]
        try:
            folder = checkpoint_folder(load) if load else None
        except UserError:
            folder = None  # it has been moved or deleted since


def _stage(folder: Path, state: RunState) -> Stage:
    recipe, data = state.recipe, state.data_state or {}
    corpora = [
        TrainingText(
            name=name,
            languages=corpus.get("languages") or {corpus["language"]: corpus["role"]},
            **{key: corpus[key] for key in ("role", "tokens", "digest")},
        )
        for name, corpus in data.get("corpora", {}).items()
    ]
    return Stage(
        name=recipe["name"],
        trainable=recipe["train"]["trainable"],
        steps=state.step,
        samples=state.consumed_samples,
        objective=_objective(recipe),
        losses=_losses(folder.parent.parent / "metrics.jsonl", state.step),
        tokens_per_language=state.tokens_per_language or {},
        corpora=tuple(corpora),
    )


def _objective(recipe: dict[str, Any]) -> str:
    terms = ["NTP"]
    for section, name in (("balance", "balance"), ("lpr", "LPR")):
        if coefficient := recipe[section]["coeff"]:
            terms.append(f"{coefficient:g} · {name}")
    return " + ".join(terms)


def _losses(metrics: Path, step: int) -> dict[str, float]:
    """Of that step, of a metrics.jsonl that may be gone or broken: then there is nothing to tell."""
    try:
        lines = (line for line in complete_lines(metrics) if (from_json(line) or {}).get("step") == step)
        record: Mapping[str, Any] = sound_record(next(lines, b"")) or {}
    except OSError:
        return {}
    losses = {"NTP": "ntp_loss", "balance": "balance_loss", "LPR": "lpr_loss"}
    return {name: record[key] for name, key in losses.items() if key in record}
