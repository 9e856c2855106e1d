"""Names and shapes of the parameters that a Megatron rank holds, written out by hand."""

import torch

PADDING_MULTIPLE = 64


def shapes_of_rank(arch, *, tp=1, ep=1, etp=1, num_frozen, num_experts, layers, te_names=False):
    """Parameters of one rank with `layers` decoder layers that is first and last stage."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    qkv = (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.head_dim
    padded = PADDING_MULTIPLE
    shapes = {"embedding.word_embeddings.weight": (padded, hidden)}
    for layer in range(layers):
        prefix = f"decoder.layers.{layer}."
        norm = "self_attention.linear_qkv.layer_norm_weight" if te_names else "input_layernorm.weight"
        shapes[prefix + ("self_attn_bda.layernorm.weight" if arch.norm_after else norm)] = (hidden,)
        shapes[prefix + "self_attention.linear_qkv.weight"] = (qkv // tp, hidden)
        if arch.qkv_bias:
            shapes[prefix + "self_attention.linear_qkv.bias"] = (qkv // tp,)
        if arch.qk_norm:
            for letter, heads in (("q", arch.num_attention_heads), ("k", arch.num_query_groups)):
                channels = heads * arch.head_dim // tp if arch.qk_norm_across_heads else arch.head_dim
                shapes[prefix + f"self_attention.{letter}_layernorm.weight"] = (channels,)
        shapes[prefix + "self_attention.linear_proj.weight"] = (
            hidden,
            arch.num_attention_heads * arch.head_dim // tp,
        )
        if not num_experts:
            norm = "mlp.linear_fc1.layer_norm_weight" if te_names else "pre_mlp_layernorm.weight"
            shapes[prefix + ("mlp_bda.layernorm.weight" if arch.norm_after else norm)] = (hidden,)
            shapes[prefix + "mlp.linear_fc1.weight"] = (2 * ffn // tp, hidden)
            shapes[prefix + "mlp.linear_fc2.weight"] = (hidden, ffn // tp)
            continue
        norm = "mlp_bda.layernorm.weight" if arch.norm_after else "pre_mlp_layernorm.weight"
        shapes[prefix + norm] = (hidden,)
        shapes[prefix + "mlp.router.weight"] = (num_experts, hidden)
        for expert in range(num_frozen):
            shapes[prefix + f"mlp.frozen_experts.{expert}.linear_fc1.weight"] = (2 * ffn, hidden)
            shapes[prefix + f"mlp.frozen_experts.{expert}.linear_fc2.weight"] = (hidden, ffn)
        for expert in range((num_experts - num_frozen) // ep):
            for linear, shape in (
                ("linear_fc1", (2 * ffn // etp, hidden)),
                ("linear_fc2", (hidden, ffn // etp)),
            ):
                name = (
                    f"mlp.experts.{linear}.weight{expert}"
                    if te_names
                    else f"mlp.experts.local_experts.{expert}.{linear}.weight"
                )
                shapes[prefix + name] = shape
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not arch.tie_word_embeddings:
        shapes["output_layer.weight"] = (padded, hidden)
    return shapes


def empty_parameters(arch, dtype=torch.float32, **layout):
    """A rank's parameters, full of NaN: what is not written shows."""
    return {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes_of_rank(arch, **layout).items()}
