"""A model's `config.json`: read from transformers 4 and 5 alike, written so that both read the same model.

transformers 5 keeps RoPE in `rope_parameters` (theta inside); 4.x knows only `rope_theta` and `rope_scaling`
and falls back to its defaults without a word when they are absent. So all three are written.
"""

import json
from pathlib import Path
from typing import Any

from megatron_lpr.errors import UserError

# Scalings that Megatron's rotary embedding computes as Hugging Face does.
ROPE_TYPES = ("linear", "llama3")
CARRIED_OVER = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "use_cache",
)


def read_config(hf_dir: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model folder. UserError where the folder or the file is missing or broken."""
    folder = Path(hf_dir)
    if not folder.is_dir():
        raise UserError(
            f"model folder '{folder}' does not exist: give the path of a downloaded Hugging Face model"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"'{folder}' holds no config.json: give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON ({error}): download the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' is not a JSON object: download the model again")
    return config


def _normalised_scaling(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    scaling = {key: value for key, value in (fields or {}).items() if key not in ("rope_theta", "type")}
    scaling["rope_type"] = (fields or {}).get("rope_type", (fields or {}).get("type", "default"))
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json has a partial_rotary_factor other than 1, which is not supported")
    return None if scaling["rope_type"] == "default" else scaling


def read_rope(config: dict[str, Any], default_theta: float) -> tuple[float, dict[str, Any] | None]:
    """RoPE's theta and its scaling (None, or a dict with `rope_type`, without theta) from either form of config.

    UserError for a scaling that is not supported, and where the two forms are both there and contradict each
    other.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    thetas = {
        float(theta)
        for theta in (config.get("rope_theta"), (old or {}).get("rope_theta"), (new or {}).get("rope_theta"))
        if theta is not None
    }
    scaling = _normalised_scaling(new or old)
    contradiction = len(thetas) > 1 or (old and new and _normalised_scaling(old) != scaling)
    if contradiction:
        raise UserError("config.json contradicts itself: rope_parameters and rope_theta/rope_scaling differ")
    if scaling and scaling["rope_type"] not in ROPE_TYPES:
        raise UserError(
            f"RoPE scaling '{scaling['rope_type']}' is not supported; supported: default, {', '.join(ROPE_TYPES)}"
        )
    return thetas.pop() if thetas else default_theta, scaling


def rope_fields(theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The three RoPE fields with which transformers 4 and 5 compute the same rotary embedding."""
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }


def dtype_fields(dtype: str) -> dict[str, str]:
    """The dtype under its name in transformers 4 and in transformers 5."""
    return {"torch_dtype": dtype, "dtype": dtype}


def carried_over(base_config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the base model's config that say nothing about its shape and stay as they are."""
    return {key: base_config[key] for key in CARRIED_OVER if key in base_config}
