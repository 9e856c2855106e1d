"""Reading a model's `config.json`, from transformers 4 and 5 alike."""

import json
from pathlib import Path
from typing import Any

from megatron_lpr.errors import UserError

# Kinds of RoPE scaling that can be computed (model/rope.py), and the numbers that each needs.
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(hf_dir: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model folder. UserError where either is missing or broken."""
    folder = Path(hf_dir)
    if not folder.is_dir():
        raise UserError(f"model folder '{folder}' does not exist: give the path of a downloaded Hugging Face model")
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
    """RoPE's theta and its scaling (None, or a dict with `rope_type` and without theta).

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
    if len(thetas) > 1 or (old and new and _normalised_scaling(old) != scaling):
        raise UserError("config.json contradicts itself: rope_parameters and rope_theta/rope_scaling differ")
    if scaling:
        _check_scaling(scaling)
    return thetas.pop() if thetas else default_theta, scaling


def _check_scaling(scaling: dict[str, Any]) -> None:
    kind = scaling["rope_type"]
    if kind not in ROPE_SCALINGS:
        raise UserError(f"RoPE scaling '{kind}' is not supported; supported: default, {', '.join(ROPE_SCALINGS)}")
    for key in ROPE_SCALINGS[kind]:
        value = scaling.get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"RoPE scaling '{kind}' in config.json has {key} = {value!r}: it must be a positive number")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("RoPE scaling 'llama3' in config.json: low_freq_factor must be below high_freq_factor")
