"""What the base scores on a run's held-out text: measured once, and kept in the run's folder for all later starts.

Stage 2 finds it in the folder of stage 1, where that was validated on the same text.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lpr.checkpoint.base_files import run_folder_of
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.files import durable
from megatron_lpr.files.json_lines import from_json, to_json
from megatron_lpr.recipe.reading import converted
from megatron_lpr.training.plan import Plan

FILE = "base_bits_per_byte.json"
Scores = tuple[CorpusScore, ...]


def recorded(plan: Plan) -> Scores | None:
    """The base's scores on this very text, from the folder of the run or of the one before it; rank 0.

    Raises:
        UserError: somebody has edited them.
    """
    for folder in _folders(plan):
        path = folder / FILE
        record = from_json(path.read_bytes()) if path.is_file() else None
        if record and record.get("key") == _key(plan):
            return _scores(path, record, [text.corpus.name for text in plan.held_out])
    return None


def record(plan: Plan, scores: Scores) -> None:
    """Keep them in the folder of the run; rank 0."""
    folder = Path(plan.recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"key": _key(plan), "corpora": [dataclasses.asdict(score) for score in scores]}
    durable.write_text(folder / FILE, to_json(tree) + "\n")


def base_is_at_hand(plan: Plan) -> bool:
    """Whether the model without its new experts is the base, when the run starts (model/frozen_path.py)."""
    below = plan.below
    untouched = below is None or not below.recipe["train"]
    return untouched or (plan.frozen_is_base and not plan.arch.num_experts)


def _scores(path: Path, record: dict[str, Any], names: list[str]) -> Scores:
    try:
        scores: Scores = converted(Scores, record.get("corpora"), str(path), "corpora")
        if [score.name for score in scores] != names:
            raise UserError(f"{path}: corpora: does not have {', '.join(names)}")
    except UserError as error:
        raise UserError(f"{error}; delete the file, and the base is scored again") from None
    return scores


def _folders(plan: Plan) -> Iterator[Path]:
    yield Path(plan.recipe.output)
    if plan.source:
        yield run_folder_of(plan.source)


def _key(plan: Plan) -> str:
    """A digest of all that the base's scores depend on."""
    about = [plan.base, plan.recipe.model.dtype, plan.recipe.evaluation.window]
    if plan.recipe.fp8.frozen_weights == "fp8":  # the base as this run holds it
        about.append(dataclasses.asdict(plan.recipe.fp8))
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for text in plan.held_out:
        corpus = text.corpus
        digest.update(json.dumps([corpus.name, corpus.language, corpus.role, text.bytes]).encode())
        digest.update(text.stream.numpy().tobytes())
        digest.update(text.scored.numpy().tobytes())
    return digest.hexdigest()
