"""Reading a model's `config.json`, from transformers 4 and 5 alike."""

import json
import reprlib
import sys
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
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not valid JSON ({error}): download the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' is not a JSON object: download the model again")
    return config


def wrong_value(hf_dir: str | Path, name: str, value: Any, must: str) -> UserError:
    """The sentence for a field of config.json that has a value of the wrong kind."""
    return UserError(f"'{hf_dir}/config.json' has {name} = {reprlib.repr(value)}: it must be {must}")


def is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_positive(value: Any) -> bool:
    """A number that a float can hold: JSON has NaN, infinity and integers of any length, as Python reads it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def read_rope(config: dict[str, Any], default_theta: float, hf_dir: str | Path) -> tuple[float, dict[str, Any] | None]:
    """RoPE's theta and its scaling (None, or a dict with `rope_type` and without theta).

    UserError for a scaling that is not supported, for values of the wrong kind, and where the two forms are both there
    and contradict each other.
    """
    given = {name: _rope_fields(config, name, hf_dir) for name in ("rope_scaling", "rope_parameters")}
    thetas = set()
    for name, fields in {"rope_theta": config, **{f"{name}.rope_theta": given[name] for name in given}}.items():
        theta = fields.get("rope_theta")
        if theta is not None:
            if not is_positive(theta):
                raise wrong_value(hf_dir, name, theta, "a positive number")
            thetas.add(float(theta))
    if config.get("partial_rotary_factor") not in (None, 1):
        raise wrong_value(hf_dir, "partial_rotary_factor", config["partial_rotary_factor"], "1, or absent")
    scalings = [_scaling(fields, name, hf_dir) for name, fields in given.items() if fields]
    if len(thetas) > 1 or any(scaling != scalings[0] for scaling in scalings):
        raise UserError(
            f"'{hf_dir}/config.json' contradicts itself: rope_parameters and rope_theta/rope_scaling differ"
        )
    return next(iter(thetas), default_theta), scalings[0] if scalings else None


def _rope_fields(config: dict[str, Any], name: str, hf_dir: str | Path) -> dict[str, Any]:
    fields = config.get(name)
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise wrong_value(hf_dir, name, fields, "an object")
    for key, value in fields.items():
        if isinstance(value, dict):  # of models whose layers have different ones
            raise wrong_value(hf_dir, f"{name}.{key}", value, "a number or text: all layers alike")
    return fields


def _scaling(fields: dict[str, Any], name: str, hf_dir: str | Path) -> dict[str, Any] | None:
    """One form, without theta; None where it scales nothing."""
    scaling = {key: value for key, value in fields.items() if key not in ("rope_theta", "type")}
    kind = scaling["rope_type"] = fields.get("rope_type", fields.get("type", "default"))
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise wrong_value(hf_dir, f"{name}.partial_rotary_factor", fields["partial_rotary_factor"], "1, or absent")
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        supported = ", ".join(("default", *ROPE_SCALINGS))
        raise UserError(
            f"'{hf_dir}/config.json' has {name}.rope_type = {reprlib.repr(kind)}: this RoPE scaling is not supported; "
            f"supported: {supported}"
        )
    for key in ROPE_SCALINGS[kind]:
        if not is_positive(scaling.get(key)):
            raise wrong_value(hf_dir, f"{name}.{key}", scaling.get(key), f"a positive number, for '{kind}'")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise wrong_value(hf_dir, f"{name}.low_freq_factor", scaling["low_freq_factor"], "below high_freq_factor")
    return scaling
