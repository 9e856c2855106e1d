"""What run.json and manifest.json of a checkpoint hold, as far as it is read entry by entry, and what does not fit.

Their digests find what a disk has done to them; but somebody may write another one.
"""

import types
import typing
from typing import Any, Literal, NotRequired, TypedDict

from megatron_lpr.checkpoint.holding import Content
from megatron_lpr.recipe.fields import LARGEST_INT


class _Model(TypedDict):
    num_experts: int
    num_frozen_experts: int
    topk: int
    dtype: str
    mlp_only_layers: list[int]
    load: str | None


class _Train(TypedDict):
    trainable: str
    steps: int
    global_batch_size: int


class _Loss(TypedDict):
    coeff: float


class _Preprocess(TypedDict):
    bos: Literal["auto", "true", "false"]


class _Recipe(TypedDict):
    name: str
    model: _Model
    train: _Train | None
    balance: _Loss
    lpr: _Loss
    preprocess: _Preprocess


class _Mixture(TypedDict):
    from_sample: int
    shares: dict[str, str]


class _Corpus(TypedDict):
    digest: str
    language: str
    role: str
    tokens: int
    languages: NotRequired[dict[str, str]]


class _Data(TypedDict):
    version: int
    consumed_samples: int
    schedule: list[_Mixture]
    corpora: dict[str, _Corpus]


class _BaseFile(TypedDict):
    bytes: int
    sha256: str


class _Base(TypedDict):
    architecture: dict[str, Any]
    weights: str | None
    tokenizer: str | None
    files: NotRequired[dict[str, _BaseFile]]


class _Source(TypedDict):
    folder: str
    run: str
    tokens: int | None


class RunJson(TypedDict):
    """Of a run.json what is read of it, as a run writes it."""

    step: int
    consumed_samples: int
    has_optimizer: bool
    recipe: _Recipe
    data_state: _Data | None
    tokens_per_language: dict[str, int] | None
    skipped_steps: int
    base: _Base
    source: _Source | None
    content: Content
    manifest: str
    version: int


class _File(TypedDict):
    size: int
    xxh3_128: str


class ManifestJson(TypedDict):
    """Of a manifest.json."""

    files: dict[str, _File]


def misfit(hint: Any, value: Any, name: str = "") -> str | None:
    """The dotted name of the first entry that is missing or not of the kind that `hint` says; None: all are."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        misfits = [misfit(one, value, name) for one in arguments]
        return None if None in misfits else misfits[0]
    if typing.is_typeddict(hint):
        if not isinstance(value, dict):
            return name
        hints = typing.get_type_hints(hint)
        inner = [
            (hints[key], value.get(key, ...), key) for key in hints if key in value or key in hint.__required_keys__
        ]
    elif origin is dict and isinstance(value, dict):
        inner = [(arguments[1], its, key) for key, its in value.items()]
    elif origin is list and isinstance(value, list):
        inner = [(arguments[0], its, str(number)) for number, its in enumerate(value)]
    else:
        return None if _is(hint, value) else name
    prefix = f"{name}." if name else ""
    return next(
        (found for its, entry, key in inner if (found := misfit(its, entry, f"{prefix}{key}")) is not None), None
    )


def _is(hint: Any, value: Any) -> bool:
    if hint is Any:
        return value is not ...
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is int:  # all of them count something
        return type(value) is int and 0 <= value <= LARGEST_INT
    return isinstance(value, (int, float) if hint is float else hint) if isinstance(hint, type) else False
