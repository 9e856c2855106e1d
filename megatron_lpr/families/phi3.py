"""Phi-3 and Phi-4: Mistral whose q, k and v, and whose gate and up, are one tensor each on disk."""

from megatron_lpr.families.llama import MISTRAL, REQUIRED
from megatron_lpr.families.table import Family, HFClass

PHI3 = Family(
    name="phi3",
    dense=HFClass(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        fields={"sliding_window": ("sliding_window",)},
        required={**REQUIRED, "attention_bias": False},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        joined={
            "self_attn.qkv_proj.weight": (
                "self_attn.q_proj.weight",
                "self_attn.k_proj.weight",
                "self_attn.v_proj.weight",
            ),
            "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        },
    ),
    dense_again=MISTRAL.dense,
    moe=MISTRAL.moe,
)
