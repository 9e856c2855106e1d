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
from megatron_lpr.checkpoint.provenance import read_provenance
from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.errors import UserError
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.files.new_folder import COMPANION_FILES
from megatron_lpr.recipe.checks import expansion_of
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe

RECORD_FILE = "megatron_lpr.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a model was made of its base.

    expansion: its frozen experts were never trained unless everything was (`trainable` "all").
    trainable: of the last stage, or "all" where any stage trained everything; None: nothing was trained.
    dtype: of the last stage, which rounded what the base has in a wider one; None: nothing was trained, or not known.
    """

    expansion: Expansion
    trainable: str | None = None
    dtype: str | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe, *stages: str) -> "Made":
        """stages: what earlier stages trained, as far as they are known."""
        trained = [*([recipe.train.trainable] if recipe.train else []), *stages]
        last = trained[0] if trained else None
        dtype = None if recipe.model.dtype == "auto" else recipe.model.dtype
        return cls(expansion=expansion_of(recipe.model), trainable="all" if "all" in trained else last, dtype=dtype)

    @property
    def untouched(self) -> int:
        """Experts that are still the base's."""
        return 0 if self.trainable == "all" else self.expansion.num_frozen

    def tree(self) -> dict[str, Any]:
        """As the record has it."""
        expansion = self.expansion
        return {
            "num_experts": expansion.num_experts,
            "num_frozen_experts": expansion.num_frozen,
            "topk": expansion.topk,
            "mlp_only_layers": expansion.mlp_only_layers,
            "trainable": self.trainable,
            "dtype": self.dtype,
        }

    def differences(self, other: "Made", own: str, others: str) -> Iterator[str]:
        """`field is A in OWN, B in OTHERS`, of what decides how a model is computed and what of it is frozen."""
        mine, theirs = self.tree(), other.tree()
        for name in ("num_experts", "num_frozen_experts", "topk", "mlp_only_layers"):
            if mine[name] != theirs[name]:
                yield f"{name} is {mine[name]} in {own}, {theirs[name]} in {others}"
        if self.expansion.num_experts and (self.trainable == "all") != (other.trainable == "all"):
            yield f"trainable is {self.trainable} in {own}, {other.trainable} in {others}"


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """The content of `megatron_lpr.json`.

    step: of the checkpoint; None: there was none. base, instruct: SHA-256 of the small files (config, tokenizer) of
    the base and, after delta grafting, of the instruct model. frozen_sha256: of all frozen tensors, where verified.
    """

    made: Made
    dtype: str
    step: int | None = None
    base: Mapping[str, str] = field(default_factory=dict)
    instruct: Mapping[str, str] | None = None
    frozen_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    def write(self, folder: Path) -> None:
        tree = {"format": _FORMAT, **dataclasses.asdict(self), "made": self.made.tree()}
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
    trainable, layers, dtype = tree.pop("trainable", None), tree.pop("mlp_only_layers"), tree.pop("dtype", None)
    numbers = [tree.pop(name) for name in ("num_experts", "num_frozen_experts", "topk")]
    if tree:
        raise ValueError(f"unknown: {', '.join(tree)}")
    if not all(type(number) is int and number >= 0 for number in (*numbers, *layers)):
        raise ValueError("numbers of experts, of layers and top-k are integers")
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"nothing is trained in dtype {dtype!r}")
    num_experts, num_frozen, topk = numbers
    expansion = Expansion(num_experts=num_experts, num_frozen=num_frozen, topk=topk, mlp_only_layers=tuple(layers))
    return Made(expansion=expansion, trainable=trainable, dtype=dtype)


def made_of(checkpoint: Path) -> Made:
    """What a checkpoint's run.json, and those of the stages before it that are still there, say was done."""
    return Made.of_recipe(recipe_of(checkpoint), *(stage.trainable for stage in read_provenance(checkpoint).stages))


def recipe_of(checkpoint: Path) -> Recipe:
    """The recipe with which a checkpoint was written, as its run.json has it."""
    return from_tree(Recipe, read_run_state(checkpoint).recipe, where=f"checkpoint {checkpoint}")


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
