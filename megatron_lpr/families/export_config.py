"""Writing a model's `config.json` so that transformers 4 and 5 read the same model.

transformers 5 keeps RoPE in `rope_parameters` (theta inside); 4.x knows only `rope_theta` and `rope_scaling`
and falls back to its defaults without a word when they are absent. So all three are written.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lpr.families import Architecture, family_of
from megatron_lpr.families.hf_config import is_integer, wrong_value
from megatron_lpr.families.table import FIELDS

_TOKENS = 2**31


def _is_token(value: Any) -> bool:
    return value is None or is_integer(value, -1, _TOKENS)


def _is_token_or_several(value: Any) -> bool:
    return all(map(_is_token, value)) if isinstance(value, list) else _is_token(value)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


# What says nothing about the model's shape and stays as it is in the base model: what transformers takes for it.
CARRIED_OVER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bos_token_id": (_is_token, "the number of a token, or null"),
    "eos_token_id": (_is_token_or_several, "the number of a token, a list of such, or null"),
    "pad_token_id": (_is_token, "the number of a token, or null"),
    "initializer_range": (lambda value: isinstance(value, float) and _is_share(value), "a number as 0.02"),
    "attention_dropout": (_is_share, "a number of at least 0"),
    "use_cache": (lambda value: isinstance(value, bool), "true or false"),
}


def check_carried_over(base_config: dict[str, Any], arch: Architecture, hf_dir: str | Path) -> None:
    """UserError where a field that an export takes over has a value with which transformers would not read it."""
    carried = _carried_over(base_config, arch)
    for name, value in carried.items():
        is_right, must = CARRIED_OVER[name]
        if not is_right(value):
            raise wrong_value(hf_dir, name, value, must)
    if (carried.get("pad_token_id") or 0) >= arch.vocab_size:
        must = f"below the vocabulary size, {arch.vocab_size}, or null"
        raise wrong_value(hf_dir, "pad_token_id", carried["pad_token_id"], must)


def _carried_over(base_config: dict[str, Any], arch: Architecture) -> dict[str, Any]:
    """What is left out is what the base's class takes for it: the export's class may take something else."""
    family = family_of(arch)
    known = {**(family.moe if arch.num_experts else family.dense).defaults, **base_config}
    return {name: known[name] for name in CARRIED_OVER if name in known}


def export_config(
    arch: Architecture, base_config: dict[str, Any], *, num_experts: int, topk: int, dtype: str
) -> dict[str, Any]:
    """The config.json of an export: the family's MoE class, or (num_experts = 0) a dense one again."""
    family = family_of(arch)
    hf_class = family.hf_class(num_experts)
    values = {**vars(arch), "num_experts": num_experts, "topk": topk}
    fields = {
        **_rope_fields(arch.rope_theta, arch.rope_scaling),
        # under its name in transformers 4 and in transformers 5
        "torch_dtype": dtype,
        "dtype": dtype,
        **{
            name: list(values[attribute]) if isinstance(values[attribute], tuple) else values[attribute]
            for attribute, names in {**FIELDS, **hf_class.fields}.items()
            for name in names
        },
    }
    if hf_class is family.dense:
        return {**base_config, **fields}
    return {
        "architectures": [hf_class.architecture],
        "model_type": hf_class.model_type,
        **fields,
        **_carried_over(base_config, arch),
        **{key: value for key, value in hf_class.required.items() if value is not None},
        **({"output_router_logits": False} if num_experts else {}),
    }


def _rope_fields(theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The three RoPE fields with which transformers 4 and 5 compute the same rotary embedding."""
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }
