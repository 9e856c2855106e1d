"""Writing a model's `config.json` so that transformers 4 and 5 read the same model.

transformers 5 keeps RoPE in `rope_parameters` (theta inside); 4.x knows only `rope_theta` and `rope_scaling`
and falls back to its defaults without a word when they are absent. So all three are written.
"""

from typing import Any

from megatron_lpr.conversion.families import Architecture, family_of
from megatron_lpr.conversion.families.table import FIELDS

# What says nothing about the model's shape and stays as it is in the base model.
CARRIED_OVER = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "use_cache",
)


def export_config(
    arch: Architecture, base_config: dict[str, Any], *, num_experts: int, topk: int, dtype: str
) -> dict[str, Any]:
    """The config.json of an export: the family's MoE class, or (num_experts = 0) its dense class again."""
    hf_class = family_of(arch).hf_class(num_experts)
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
    if not num_experts:
        return {**base_config, **fields}
    return {
        "architectures": [hf_class.architecture],
        "model_type": hf_class.model_type,
        **fields,
        **{key: base_config[key] for key in CARRIED_OVER if key in base_config},
        **{key: value for key, value in hf_class.required.items() if value is not None},
        "output_router_logits": False,
    }


def _rope_fields(theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The three RoPE fields with which transformers 4 and 5 compute the same rotary embedding."""
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }
