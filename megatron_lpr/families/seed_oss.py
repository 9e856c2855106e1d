"""Seed-OSS: Llama with biases of q, k and v and a `head_dim` of its own, which Qwen2-MoE can carry."""

from megatron_lpr.families.llama import REQUIRED
from megatron_lpr.families.qwen import QKV_BIAS, QWEN2
from megatron_lpr.families.table import LAYER, Family, HFClass

SEED_OSS = Family(
    name="seed_oss",
    dense=HFClass(
        architecture="SeedOssForCausalLM",
        model_type="seed_oss",
        # fields that must have this value, because no mapping below carries another
        required={**REQUIRED, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
        # what transformers assumes for a field that config.json leaves out
        defaults={
            "max_position_embeddings": 524288,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "attention_dropout": 0.1,
        },
    ),
    moe=QWEN2.moe,  # the class with experts that computes the same attention
    layer=(*LAYER, QKV_BIAS),  # attention and norms of a layer; embedding, head and FFN are those of all families
)
