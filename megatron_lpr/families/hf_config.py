"""A model's `config.json`, of transformers 4 and 5 alike, and the `Architecture` that it says, by the family tables."""

import json
import reprlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from megatron_lpr.errors import UserError
from megatron_lpr.families.refused import why_not
from megatron_lpr.families.table import FIELDS, Architecture, Family, HFClass
from megatron_lpr.files.safetensors_io import DTYPES, dtype_on_disk
from megatron_lpr.files.unexpanded import refuse_unexpanded

# Kinds of RoPE scaling that can be computed (model/rope.py), and the numbers that each needs.
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Of the zero shared expert that Qwen2-MoE insists on: under 1% of a small model, and divisible by any tensor-parallel
# size that a server would use.
SHARED_EXPERT_SIZE = 128
# Beyond any model, and within what names of tensors can be listed for; a sign of a broken file.
_MOST = {"num_layers": 10**4, "num_experts": 10**4, "max_position_embeddings": 2**31 - 1}
_MOST_OTHERWISE = 10**8
MOST_EXPERTS = 10**6  # of all layers


def read_config(hf_dir: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model folder. UserError where either is missing or broken."""
    folder = Path(hf_dir)
    if not folder.is_dir():
        refuse_unexpanded(hf_dir)
        mend = "give the path of a downloaded Hugging Face model (`hf download NAME --local-dir FOLDER`)"
        raise UserError(f"model folder '{folder}' does not exist: {mend}")
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


def is_integer(value: Any, least: int, most: int) -> TypeGuard[int]:
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


def read_model(hf_dir: str | Path, families: Iterable[Family]) -> Architecture:
    """See `read_architecture`, which knows all families."""
    config = read_config(hf_dir)
    family, hf_class = _find_class(config, families, hf_dir)
    theta, scaling = read_rope(config, hf_class.rope_theta, hf_dir)
    config = {**hf_class.defaults, **config}
    _check_required(config, hf_class, hf_dir)
    values = _Values(config, hf_class, hf_dir)
    arch = _architecture(values, family, hf_class, rope_theta=theta, rope_scaling=scaling, dtype=_dtype(config, hf_dir))
    _check_together(values, arch)
    if arch.mlp_only_layers and config.get("intermediate_size") != arch.ffn_hidden_size:
        raise UserError(f"'{hf_dir}' has layers without experts whose FFN has another width, which is not supported")
    return arch


def _find_class(config: dict[str, Any], families: Iterable[Family], hf_dir: str | Path) -> tuple[Family, HFClass]:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise wrong_value(hf_dir, "architectures", names, "a list with the name of a class, as ['LlamaForCausalLM']")
    classes = [(family, hf_class) for family in families for hf_class in (family.dense, family.moe)]
    for family, hf_class in classes:
        if hf_class.architecture == names[0]:
            # transformers reads the fields by this one, with the names and defaults of its own class
            if config.get("model_type", hf_class.model_type) != hf_class.model_type:
                must = f"'{hf_class.model_type}', with which alone a {names[0]} can be converted"
                raise wrong_value(hf_dir, "model_type", config["model_type"], must)
            return family, hf_class
    raise UserError(f"'{hf_dir}' is a {names[0]}, {why_not(names[0], config, [each for _, each in classes])}")


def _check_required(config: dict[str, Any], hf_class: HFClass, hf_dir: str | Path) -> None:
    for key, value in hf_class.required.items():
        if config.get(key, value) != value:
            raise UserError(
                f"'{hf_dir}' has {key} = {config[key]!r} in its config.json; "
                f"a {hf_class.architecture} can only be converted with {key} = {value!r}"
            )
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise wrong_value(hf_dir, "layer_types", kinds, "a list of names")
    # Mistral's layers are all alike, whatever this says; Qwen's are full where `use_sliding_window` is false
    if "sliding_window" not in hf_class.fields and set(kinds) - {"full_attention"}:
        raise UserError(f"'{hf_dir}' has layers of several kinds (layer_types), which is not supported")


def _dtype(config: dict[str, Any], hf_dir: str | Path) -> str:
    name = "dtype" if config.get("dtype") else "torch_dtype"
    dtype = config.get(name) or dtype_on_disk(hf_dir)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"'{hf_dir}/config.json' has {name} = {dtype!r}; supported: {', '.join(DTYPES)}")
    return dtype


class _Values:
    """The values of an `Architecture` as config.json has them, each checked when it is asked for."""

    def __init__(self, config: dict[str, Any], hf_class: HFClass, hf_dir: str | Path):
        self._config, self._hf_dir = config, hf_dir
        self._names = {**FIELDS, **hf_class.fields}

    def get(self, attribute: str) -> Any:
        """None where the class has no such field, and for null."""
        return self._config.get(self.name(attribute)) if attribute in self._names else None

    def name(self, attribute: str) -> str:
        """The first field that is there and not null, or the first of all."""
        names = self._names[attribute]
        return next((name for name in names if self._config.get(name) is not None), names[0])

    def wrong(self, attribute: str, must: str) -> UserError:
        return wrong_value(self._hf_dir, self.name(attribute), self.get(attribute), must)

    def size(self, attribute: str, default: int | None = None) -> int:
        found = self.get(attribute)
        value = default if found is None else found
        most = _MOST.get(attribute, _MOST_OTHERWISE)
        if not is_integer(value, 1, most):
            raise self.wrong(attribute, f"a positive integer, at most {most}")
        return value

    def flag(self, attribute: str) -> bool:
        if not isinstance(self.get(attribute), bool | None):
            raise self.wrong(attribute, "true or false")
        return bool(self.get(attribute))

    def epsilon(self, attribute: str) -> float:
        if not is_positive(self.get(attribute)):
            raise self.wrong(attribute, "a positive number")
        return float(self.get(attribute))

    def layers(self, attribute: str, num_layers: int) -> tuple[int, ...]:
        layers = self.get(attribute) or ()
        right = isinstance(layers, list | tuple) and all(is_integer(layer, 0, num_layers - 1) for layer in layers)
        if not right or len(set(layers)) == num_layers:
            raise self.wrong(attribute, f"a list of some, not all, of the layers 0 to {num_layers - 1}")
        return tuple(layers)

    def width(self, attribute: str) -> int:
        """A size that may be 0."""
        if not is_integer(self.get(attribute), 0, _MOST_OTHERWISE):
            raise self.wrong(attribute, "an integer of at least 0")
        return self.get(attribute)


def _architecture(values: _Values, family: Family, hf_class: HFClass, **others: Any) -> Architecture:
    num_layers = values.size("num_layers")
    heads, hidden = values.size("num_attention_heads"), values.size("hidden_size")
    if values.get("head_dim") is None and hidden % heads:
        raise values.wrong("hidden_size", f"a multiple of num_attention_heads ({heads}) where there is no head_dim")
    return Architecture(
        family=family.name,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=values.size("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=values.size("num_query_groups", heads),
        head_dim=values.size("head_dim", hidden // heads),
        vocab_size=values.size("vocab_size"),
        max_position_embeddings=values.size("max_position_embeddings"),
        rms_norm_eps=values.epsilon("rms_norm_eps"),
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        qkv_bias=family.has("self_attention.linear_qkv.bias"),
        qk_norm=family.has("self_attention.q_layernorm.weight"),
        sliding_window=None if values.get("sliding_window") is None else values.size("sliding_window"),
        num_experts=values.size("num_experts") if hf_class is family.moe else 0,
        topk=values.size("topk") if hf_class is family.moe else 0,
        mlp_only_layers=values.layers("mlp_only_layers", num_layers),
        rope_interleaved=family.rope_interleaved,
        qk_norm_across_heads=family.has("self_attention.q_layernorm.weight", of="Q"),
        norm_after=family.has("mlp_bda.layernorm.weight"),
        shared_expert_size=_shared_expert_size(values, family, hf_class),
        **others,
    )


def _check_together(values: _Values, arch: Architecture) -> None:
    """Numbers that must fit each other."""
    if arch.num_attention_heads % arch.num_query_groups:
        raise values.wrong("num_query_groups", f"a divisor of num_attention_heads ({arch.num_attention_heads})")
    if arch.head_dim % 2:
        asked = "num_attention_heads" if values.get("head_dim") is None else "head_dim"
        raise values.wrong(asked, f"such that a head has an even size, not {arch.head_dim}: RoPE turns pairs")
    if arch.topk > arch.num_experts:
        raise values.wrong("topk", f"at most the number of experts, {arch.num_experts}")
    if arch.num_layers * arch.num_experts > MOST_EXPERTS:
        raise values.wrong("num_experts", f"at most {MOST_EXPERTS} in all {arch.num_layers} layers together")


def _shared_expert_size(values: _Values, family: Family, hf_class: HFClass) -> int:
    if "shared_expert_size" not in family.moe.fields:
        return 0
    return values.width("shared_expert_size") if hf_class is family.moe else SHARED_EXPERT_SIZE
