"""Llama 2 to 3.2 and Mistral: no biases, no norms inside attention; with experts they are Mixtral."""

from megatron_lpr.families.table import Family, HFClass, MoEClass

REQUIRED = {"hidden_act": "silu", "quantization_config": None}

MIXTRAL = MoEClass(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    fields={
        "num_experts": ("num_local_experts",),
        "topk": ("num_experts_per_tok",),
        "sliding_window": ("sliding_window",),
    },
    required={**REQUIRED, "router_jitter_noise": 0.0},
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    rope_theta=1e6,
    router="block_sparse_moe.gate.weight",
    expert="block_sparse_moe.experts.{expert}.{weight}",
    weights={"gate_proj.weight": "w1.weight", "up_proj.weight": "w3.weight", "down_proj.weight": "w2.weight"},
)

# The first of a MoE class's families is the one that it is read as: Mistral's fields include Llama's.
MISTRAL = Family(
    name="mistral",
    dense=HFClass(
        architecture="MistralForCausalLM",
        model_type="mistral",
        fields={"sliding_window": ("sliding_window",)},
        required=REQUIRED,
        defaults={
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
        },
    ),
    moe=MIXTRAL,
)
LLAMA = Family(
    name="llama",
    dense=HFClass(
        architecture="LlamaForCausalLM",
        model_type="llama",
        required={**REQUIRED, "attention_bias": False, "mlp_bias": False, "sliding_window": None},
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    ),
    moe=MIXTRAL,
)
