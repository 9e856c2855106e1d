"""From a config.json to an `Architecture`, by the family tables."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_lpr.conversion.families.table import FIELDS, Architecture, Family, HFClass
from megatron_lpr.conversion.hf_config import read_config, read_rope
from megatron_lpr.conversion.hf_io import DTYPES, dtype_on_disk
from megatron_lpr.errors import UserError

# Of the zero shared expert that Qwen2-MoE insists on: under 1% of a small model, and divisible by any tensor-parallel
# size that a server would use.
SHARED_EXPERT_SIZE = 128


def read_model(hf_dir: str | Path, families: Iterable[Family]) -> Architecture:
    """See `read_architecture`, which knows all families."""
    config = read_config(hf_dir)
    family, hf_class = _find_class(config, families, hf_dir)
    theta, scaling = read_rope(config, default_theta=hf_class.rope_theta)
    config = {**hf_class.defaults, **config}
    _check_required(config, hf_class, hf_dir)
    values = {
        attribute: next((config[name] for name in names if config.get(name) is not None), None)
        for attribute, names in {**FIELDS, **hf_class.fields}.items()
    }
    dtype = config.get("dtype") or config.get("torch_dtype") or dtype_on_disk(hf_dir)
    if dtype not in DTYPES:
        raise UserError(f"'{hf_dir}/config.json' has dtype {dtype!r}; supported: {', '.join(DTYPES)}")
    arch = _architecture(values, family, hf_class, hf_dir, rope_theta=theta, rope_scaling=scaling, dtype=dtype)
    if arch.mlp_only_layers and config.get("intermediate_size") != arch.ffn_hidden_size:
        raise UserError(f"'{hf_dir}' has layers without experts whose FFN has another width, which is not supported")
    return arch


def _find_class(config: dict[str, Any], families: Iterable[Family], hf_dir: str | Path) -> tuple[Family, HFClass]:
    name = (config.get("architectures") or ["none"])[0]
    classes = [(family, hf_class) for family in families for hf_class in (family.dense, family.moe)]
    for family, hf_class in classes:
        if hf_class.architecture == name:
            return family, hf_class
    supported = ", ".join(sorted({hf_class.architecture for _, hf_class in classes}))
    raise UserError(f"'{hf_dir}' is a {name}, which is not supported; supported: {supported}")


def _check_required(config: dict[str, Any], hf_class: HFClass, hf_dir: str | Path) -> None:
    for key, value in hf_class.required.items():
        if config.get(key, value) != value:
            raise UserError(
                f"'{hf_dir}' has {key} = {config[key]!r} in its config.json; "
                f"a {hf_class.architecture} can only be converted with {key} = {value!r}"
            )
    # Mistral's layers are all alike, whatever this says; Qwen's are full where `use_sliding_window` is false
    if "sliding_window" not in hf_class.fields and set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"'{hf_dir}' has layers of several kinds (layer_types), which is not supported")


def _architecture(
    values: dict[str, Any], family: Family, hf_class: HFClass, hf_dir: str | Path, **others: Any
) -> Architecture:
    def size(attribute: str, default: int | None = None) -> int:
        value = default if values[attribute] is None else values[attribute]
        if not isinstance(value, int) or value < 1:
            name = {**FIELDS, **hf_class.fields}[attribute][0]
            raise UserError(f"'{hf_dir}/config.json' has {name} = {value!r}: it must be a positive integer")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    window = values.get("sliding_window")
    return Architecture(
        family=family.name,
        num_layers=size("num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=size("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=size("num_query_groups", heads),
        head_dim=size("head_dim", hidden // heads),
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings"),
        rms_norm_eps=float(values["rms_norm_eps"]),
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        qkv_bias=family.has("self_attention.linear_qkv.bias"),
        qk_norm=family.has("self_attention.q_layernorm.weight"),
        sliding_window=None if window is None else size("sliding_window"),
        num_experts=size("num_experts") if hf_class is family.moe else 0,
        topk=size("topk") if hf_class is family.moe else 0,
        mlp_only_layers=tuple(values.get("mlp_only_layers") or ()),
        shared_expert_size=_shared_expert_size(values, family, hf_class),
        **others,
    )


def _shared_expert_size(values: dict[str, Any], family: Family, hf_class: HFClass) -> int:
    if "shared_expert_size" not in family.moe.fields:
        return 0
    return values["shared_expert_size"] if hf_class is family.moe else SHARED_EXPERT_SIZE
