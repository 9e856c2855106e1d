"""Qwen 1.5 to 3: with biases of q, k and v (Qwen2-MoE) or norms of q and k (Qwen3-MoE)."""

from megatron_lpr.families.llama import REQUIRED
from megatron_lpr.families.mappings import QKV, Copy, Mapping
from megatron_lpr.families.table import LAYER, Family, HFClass, MoEClass

QKV_BIAS = Mapping(
    "self_attention.linear_qkv.bias",
    QKV(),
    {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
)
QK_NORM = (
    Mapping("self_attention.q_layernorm.weight", Copy(), {"self_attn.q_norm.weight": "D"}),
    Mapping("self_attention.k_layernorm.weight", Copy(), {"self_attn.k_norm.weight": "D"}),
)
NO_WINDOW = {**REQUIRED, "use_sliding_window": False}
DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
# Its default renormalises nothing, which is another function.
MOE_REQUIRED = {**NO_WINDOW, "norm_topk_prob": True, "decoder_sparse_step": 1}
MOE_DEFAULTS = {**DEFAULTS, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": ()}
MOE_FIELDS = {
    "topk": ("num_experts_per_tok",),
    "ffn_hidden_size": ("moe_intermediate_size", "intermediate_size"),
    "mlp_only_layers": ("mlp_only_layers",),
}

QWEN2 = Family(
    name="qwen2",
    dense=HFClass(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        required=NO_WINDOW,
        defaults={**DEFAULTS, "num_key_value_heads": 32},
    ),
    moe=MoEClass(
        architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        fields={
            **MOE_FIELDS,
            "num_experts": ("num_experts",),
            "shared_expert_size": ("shared_expert_intermediate_size",),
        },
        required={**MOE_REQUIRED, "qkv_bias": True},
        defaults={
            **MOE_DEFAULTS,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
        },
        zeros={
            "mlp.shared_expert.gate_proj.weight": "SH",
            "mlp.shared_expert.up_proj.weight": "SH",
            "mlp.shared_expert.down_proj.weight": "HS",
            "mlp.shared_expert_gate.weight": "1H",
        },
        any_head_dim=False,
    ),
    layer=(*LAYER, QKV_BIAS),
)
QWEN3 = Family(
    name="qwen3",
    dense=HFClass(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        required={**NO_WINDOW, "attention_bias": False},
        defaults={**DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
    ),
    moe=MoEClass(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        # transformers 5 writes the second name, 4.57 reads the first
        fields={**MOE_FIELDS, "num_experts": ("num_experts", "num_local_experts")},
        required={**MOE_REQUIRED, "attention_bias": False},
        defaults={**MOE_DEFAULTS, "num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
    layer=(*LAYER, *QK_NORM),
)
