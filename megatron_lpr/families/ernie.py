"""ERNIE 4.5 without experts, and Helium: Llama whose RoPE turns channels side by side; with experts ERNIE 4.5 MoE."""

from megatron_lpr.families.llama import REQUIRED
from megatron_lpr.families.table import Family, HFClass, MoEClass

ERNIE_MOE = MoEClass(
    architecture="Ernie4_5_MoeForCausalLM",
    model_type="ernie4_5_moe",
    fields={
        "num_experts": ("moe_num_experts",),
        "topk": ("moe_k",),
        "ffn_hidden_size": ("moe_intermediate_size", "intermediate_size"),
    },
    required={
        **REQUIRED,
        "use_bias": False,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_interval": 1,
    },
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    rope_theta=5e5,
    # added to the probabilities for the choice of experts alone
    zeros={"mlp.moe_statics.e_score_correction_bias": "1E"},
)
ERNIE = Family(
    name="ernie4_5",
    dense=HFClass(
        architecture="Ernie4_5ForCausalLM",
        model_type="ernie4_5",
        required={**REQUIRED, "use_bias": False},
        defaults={
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        rope_theta=5e5,
    ),
    moe=ERNIE_MOE,
    rope_interleaved=True,
)
HELIUM = Family(
    name="helium",
    dense=HFClass(
        architecture="HeliumForCausalLM",
        model_type="helium",
        required={**REQUIRED, "attention_bias": False, "mlp_bias": False},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-8,
            "num_key_value_heads": 20,
            "head_dim": 128,
            "pad_token_id": 3,
        },
        rope_theta=1e5,
    ),
    moe=ERNIE_MOE,
    rope_interleaved=True,
)
