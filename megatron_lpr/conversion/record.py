"""What was done to a model, in a file beside its config.json: verification reads it, and so can you.

The model card tells people the same. What is frozen and how tokens are routed is what the checkpoint's own run.json
says, so that no recipe that is typed later can say otherwise.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_lpr import __version__
from megatron_lpr.errors import UserError
from megatron_lpr.files.new_folder import COMPANION_FILES
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe

RECORD_FILE = "megatron_lpr.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a model was made of its base; for a dense one the numbers are 0.

    num_frozen_experts: experts 0..n-1, which were never trained unless everything was (`trainable` "all").
    trainable: of the last stage, or "all" where any stage trained everything; None: nothing was trained.
    """

    num_experts: int
    num_frozen_experts: int
    topk: int
    mlp_only_layers: tuple[int, ...] = ()
    trainable: str | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe, *stages: str) -> "Made":
        """stages: what earlier stages trained, as far as they are known."""
        model = recipe.model
        trained = [*([recipe.train.trainable] if recipe.train else []), *stages]
        return cls(
            num_experts=model.num_experts,
            num_frozen_experts=model.num_frozen_experts if model.num_experts else 0,
            topk=model.topk if model.num_experts else 0,
            mlp_only_layers=tuple(sorted(set(model.mlp_only_layers))),
            trainable="all" if "all" in trained else (trained or [None])[0],
        )

    @property
    def untouched(self) -> int:
        """Experts that are still the base's."""
        return 0 if self.trainable == "all" else self.num_frozen_experts

    def differences(self, other: "Made", own: str, others: str) -> Iterator[str]:
        """`field is A in OWN, B in OTHERS`, of what decides how a model is computed and what of it is frozen."""
        for name in ("num_experts", "num_frozen_experts", "topk", "mlp_only_layers"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                yield f"{name} is {mine} in {own}, {theirs} in {others}"
        if self.num_experts and (self.trainable == "all") != (other.trainable == "all"):
            yield f"trainable is {self.trainable} in {own}, {other.trainable} in {others}"


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """The content of `megatron_lpr.json`.

    step: of the checkpoint; None: there was none. base, instruct: SHA-256 of the small files (config, tokenizer) of
    the base and, after delta grafting, of the instruct model. frozen_sha256: `frozen_digest`, where it was verified.
    """

    made: Made
    dtype: str
    step: int | None = None
    base: Mapping[str, str] = field(default_factory=dict)
    instruct: Mapping[str, str] | None = None
    frozen_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    def write(self, folder: Path) -> None:
        tree = {"format": _FORMAT, **dataclasses.asdict(self)}
        (folder / RECORD_FILE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> ExportRecord | None:
    """The record of an export; None for one that has none. UserError when it cannot be understood."""
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        return ExportRecord(made=_made(tree.pop("made")), **tree)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{path}' is no record of an export that this version understands ({type(error).__name__}: {error})"
        ) from error


def _made(tree: dict[str, Any]) -> Made:
    made = Made(**tree | {"mlp_only_layers": tuple(tree["mlp_only_layers"])})
    numbers = [made.num_experts, made.num_frozen_experts, made.topk, *made.mlp_only_layers]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("numbers of experts, of layers and top-k are integers")
    return made


def made_of(checkpoint: Path) -> Made:
    """What a checkpoint's run.json, and those of the stages before it that are still there, say was done."""
    from megatron_lpr.checkpoint.provenance import read_provenance
    from megatron_lpr.checkpoint.run_state import read_run_state

    recipe = from_tree(Recipe, read_run_state(checkpoint).recipe, where=f"checkpoint {checkpoint}")
    return Made.of_recipe(recipe, *(stage.trainable for stage in read_provenance(checkpoint).stages))


def digests(hf_dir: str | Path) -> dict[str, str]:
    """SHA-256 of a model's config, tokenizer and generation files, those that are there."""
    files = [Path(hf_dir) / name for name in ("config.json", *COMPANION_FILES)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def _versions() -> dict[str, str]:
    found = {"megatron_lpr": __version__}
    for package in ("megatron-core", "torch", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
