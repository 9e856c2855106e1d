"""OLMo 2: norms of what leaves attention and FFN, not of what enters them, and of q and k over all heads at once; with
experts it is FlexOlmo (arXiv 2507.07024)."""

from megatron_lpr.families.llama import REQUIRED
from megatron_lpr.families.mappings import Copy, Mapping
from megatron_lpr.families.qwen import MOE_FIELDS
from megatron_lpr.families.table import LAYER, Family, HFClass, MoEClass

_BEFORE = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
NORMS = (
    Mapping("self_attention.q_layernorm.weight", Copy(split=0), {"self_attn.q_norm.weight": "Q"}),
    Mapping("self_attention.k_layernorm.weight", Copy(split=0), {"self_attn.k_norm.weight": "K"}),
    Mapping("self_attn_bda.layernorm.weight", Copy(), {"post_attention_layernorm.weight": "H"}),
    Mapping("mlp_bda.layernorm.weight", Copy(), {"post_feedforward_layernorm.weight": "H"}),
)
ATTENTION = {**REQUIRED, "attention_bias": False, "clip_qkv": None}

OLMO2 = Family(
    name="olmo2",
    dense=HFClass(
        architecture="Olmo2ForCausalLM",
        model_type="olmo2",
        required=ATTENTION,
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
    ),
    moe=MoEClass(
        architecture="FlexOlmoForCausalLM",
        model_type="flex_olmo",
        fields={"num_experts": ("num_experts",), "topk": MOE_FIELDS["topk"]},
        # its default renormalises nothing, which is another function
        required={**ATTENTION, "norm_topk_prob": True},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "num_experts": 7,
            "num_experts_per_tok": 5,
            "norm_topk_prob": False,
        },
        rope_theta=5e5,
    ),
    layer=(*(mapping for mapping in LAYER if mapping.megatron not in _BEFORE), *NORMS),
)
