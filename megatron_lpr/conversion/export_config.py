"""Writing a model's `config.json` so that transformers 4 and 5 read the same model.

transformers 5 keeps RoPE in `rope_parameters` (theta inside); 4.x knows only `rope_theta` and `rope_scaling`
and falls back to its defaults without a word when they are absent. So all three are written.
"""

from typing import Any

from megatron_lpr.conversion.families import Architecture, family_of

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
    family = family_of(arch)
    shared = {
        **_rope_fields(arch.rope_theta, arch.rope_scaling),
        **_dtype_fields(dtype),
        "head_dim": arch.head_dim,
    }
    if not num_experts:
        return {**base_config, **shared}
    return {
        "architectures": [family.moe.architecture],
        "model_type": family.moe.model_type,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.rms_norm_eps,
        "tie_word_embeddings": arch.tie_word_embeddings,
        **shared,
        **{key: base_config[key] for key in CARRIED_OVER if key in base_config},
        **{field_name: num_experts for field_name in family.moe.num_experts_fields},
        "num_experts_per_tok": topk,
        **family.moe.config,
    }


def _rope_fields(theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The three RoPE fields with which transformers 4 and 5 compute the same rotary embedding."""
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }


def _dtype_fields(dtype: str) -> dict[str, str]:
    """The dtype under its name in transformers 4 and in transformers 5."""
    return {"torch_dtype": dtype, "dtype": dtype}
