"""Which modules make a layer: Megatron's own specs, with the FFN, the core attention and the norms exchanged.

Megatron-Core 0.16 describes an MoE layer by a ModuleSpec, 0.19 by a functools.partial; both are read here and a
ModuleSpec is written, which both accept.
"""

import copy
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_lpr.families import Architecture
from megatron_lpr.model.attention import SDPACoreAttention
from megatron_lpr.model.expert_linear import ExpertColumnParallelLinear
from megatron_lpr.model.frozen_expert import DuplicatedLinear, te_duplicated_linear
from megatron_lpr.model.grouped_experts import GroupedExperts, replaces_transformer_engine
from megatron_lpr.model.grouped_linear import frozen_aware
from megatron_lpr.model.lpr_moe_layer import LPRMoELayer
from megatron_lpr.model.lpr_router import LPRRouter
from megatron_lpr.model.norms import AcrossHeadsAttention, NormThenAdd, SequenceParallelRMSNorm
from megatron_lpr.model.transformer_config import LPRTransformerConfig, layer_has_experts


def block_spec(
    config: TransformerConfig, arch: Architecture, te: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this rank's model chunk: dense ones, and ones with experts where the model has them."""
    first = get_transformer_layer_offset(config, vp_stage)
    here = layer_has_experts(config)[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    kinds = {has_experts: _layer(config, arch, te, has_experts) for has_experts in set(here)}
    if te:
        from megatron.core.extensions.transformer_engine import TENorm as norm
    else:
        norm = SequenceParallelRMSNorm
    return TransformerBlockSubmodules([kinds[has_experts] for has_experts in here], layer_norm=norm)


def _layer(config: TransformerConfig, arch: Architecture, te: bool, has_experts: bool) -> ModuleSpec:
    layer = _te_layer(config, has_experts) if te else _local_layer(config)
    if arch.qk_norm_across_heads:
        layer.submodules.self_attention.module = AcrossHeadsAttention
    if arch.norm_after:
        _norm_after(layer, config, te, has_experts)
    if has_experts:
        assert isinstance(config, LPRTransformerConfig)
        layer.submodules.mlp = _lpr_moe(config, te)
        # Without this a local-spec checkpoint names the MoE layer's norm as if it were fused into a linear layer,
        # and a TE-spec model could not load it.
        layer.submodules.sharded_state_dict_keys_map = {
            key: name
            for key, name in (layer.submodules.sharded_state_dict_keys_map or {}).items()
            if not key.startswith("pre_mlp_layernorm")
        }
    return layer


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    layer = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm))
    submodules, attention = layer.submodules, layer.submodules.self_attention.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    return layer


def _te_layer(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    from megatron_lpr.model.te_attention import TEDocumentAttention

    experts = dict(num_experts=config.num_moe_experts, moe_grouped_gemm=True) if has_experts else {}
    layer = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm, **experts))
    layer.submodules.self_attention.submodules.core_attention = TEDocumentAttention
    return layer


def _norm_after(layer: ModuleSpec, config: TransformerConfig, te: bool, has_experts: bool) -> None:
    """Norm what leaves attention and FFN, not what enters them."""
    norm: Any = SequenceParallelRMSNorm
    if te:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        norm = TENorm
        layer.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        if not has_experts:
            submodules_of(layer.submodules.mlp).linear_fc1 = TEColumnParallelLinear
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    then_add = ModuleSpec(module=NormThenAdd, params={"config": config, "norm": norm})
    layer.submodules.self_attn_bda = layer.submodules.mlp_bda = then_add


def _lpr_moe(config: LPRTransformerConfig, te: bool) -> ModuleSpec:
    te_experts = te and not replaces_transformer_engine(config)
    moe = get_moe_module_spec(use_te=te_experts, num_experts=config.num_moe_experts, moe_grouped_gemm=te_experts)
    submodules = submodules_of(moe)
    submodules.router = LPRRouter
    linears = submodules_of(submodules.experts)
    if te_experts:
        linears.linear_fc1, linears.linear_fc2 = map(frozen_aware, (linears.linear_fc1, linears.linear_fc2))
    else:
        linears.linear_fc1 = ExpertColumnParallelLinear
        submodules.experts = ModuleSpec(module=GroupedExperts, submodules=submodules_of(submodules.experts))
    # the host takes several times as long to launch a product of Transformer Engine's, and in bf16 it is the same one
    frozen_linear = te_duplicated_linear if te and config.fp8 else DuplicatedLinear
    return ModuleSpec(
        module=LPRMoELayer,
        submodules=submodules,
        params={"frozen_linear": frozen_linear},
        metainfo={"fuse_pre_mlp_layernorm": False},
    )


def submodules_of(spec):
    """The submodules of a module's description, in either form."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules
