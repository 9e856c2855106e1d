"""Megatron's TransformerConfig for a recipe and a dense architecture."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lpr.families import Architecture
from megatron_lpr.files.safetensors_io import torch_dtype
from megatron_lpr.model.fused_kernels import fused_kernels
from megatron_lpr.recipe.settings import Recipe


@dataclass
class LPRTransformerConfig(TransformerConfig):
    """Megatron's configuration and what MoE-LPR adds. `num_moe_experts` counts the new (dispatched) experts."""

    num_frozen_experts: int = 1
    balance_coeff: float = 0.0
    balance_per_sequence: bool = True
    lpr_coeff: float = 0.0
    lpr_double_softmax: bool = False
    overlap_frozen: bool = False
    rows_of_an_expert: int = 0

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts; the auxiliary losses are means over them."""
        return sum(layer_has_experts(self))

    @property
    def num_all_experts(self) -> int:
        """Outputs of the router: frozen and new experts."""
        return self.num_frozen_experts + self.num_moe_experts


def layer_has_experts(config: TransformerConfig) -> list[bool]:
    """For every layer of the model. (Megatron's other form of `moe_layer_freq`, every n-th layer, is not used here.)"""
    if isinstance(config.moe_layer_freq, list):
        return [bool(has) for has in config.moe_layer_freq]
    return [bool(config.num_moe_experts)] * config.num_layers


def transformer_config(recipe: Recipe, arch: Architecture, te: bool) -> TransformerConfig:
    """The configuration of a dense model (`model.num_experts: 0`) or of its upcycled form.

    With Transformer Engine (`te`) the new experts of a rank run as grouped products: its own, or torch's.
    """
    dtype, fused = torch_dtype(recipe.model.dtype), fused_kernels(recipe, arch, te)
    common = dict(
        **_architecture(arch),
        **_parallel(recipe),
        **_recompute(recipe),
        **_fp8(recipe),
        apply_rope_fusion=fused.rope,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # gradients are summed: every loss is divided by its global count before the backward pass
        calculate_per_token_loss=True,
        # Every parameter is filled from the base model or a checkpoint. Megatron's own initialisation still runs,
        # for it also marks tensor-parallel weights as such, and the gradient norm counts them by that mark.
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        use_cpu_initialization=False,  # that would allocate each weight whole, on every rank
    )
    if not recipe.model.num_experts:
        return TransformerConfig(**common)
    return LPRTransformerConfig(
        **common,
        num_moe_experts=recipe.model.num_experts - recipe.model.num_frozen_experts,
        num_frozen_experts=recipe.model.num_frozen_experts,
        moe_ffn_hidden_size=arch.ffn_hidden_size,
        # Megatron names the layers of a checkpoint one by one where this is a list
        moe_layer_freq=[int(n in arch.moe_layers()) for n in range(arch.num_layers)] if arch.mlp_only_layers else 1,
        moe_grouped_gemm=te,
        moe_router_topk=recipe.model.topk,
        # Megatron insists for top-1, and LPRRouter, which always renormalises over the chosen experts, does not read it
        moe_router_pre_softmax=recipe.model.topk == 1,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # the balance loss is ours, over frozen and new experts
        moe_token_dispatcher_type=recipe.parallel.dispatcher,
        moe_router_fusion=fused.router,
        moe_permute_fusion=fused.permutation,
        balance_coeff=recipe.balance.coeff,
        balance_per_sequence=recipe.balance.group == "sequence",
        lpr_coeff=recipe.lpr.coeff,
        lpr_double_softmax=recipe.lpr.loss == "double_softmax",
        overlap_frozen=_overlaps_frozen(recipe),
        rows_of_an_expert=_rows_of_an_expert(recipe),
    )


def _architecture(arch: Architecture) -> dict:
    return dict(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        qk_layernorm=arch.qk_norm and not arch.qk_norm_across_heads,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        rotary_interleaved=arch.rope_interleaved,
        # Megatron counts the positions to the left of a query, transformers counts its own too
        window_size=(arch.sliding_window - 1, 0) if arch.sliding_window else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _parallel(recipe: Recipe) -> dict:
    sizes = recipe.parallel
    on_gpu = torch.cuda.is_available()
    # of two stages; given both, Megatron's interleaved schedule divides by the number of stages between them, none
    first_says_all = sizes.pipeline == 2 and sizes.first_stage_layers is not None
    return dict(
        tensor_model_parallel_size=sizes.tensor,
        sequence_parallel=sizes.tensor > 1,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline if sizes.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=sizes.first_stage_layers,
        num_layers_in_last_pipeline_stage=None if first_says_all else sizes.last_stage_layers,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        batch_p2p_comm=on_gpu,  # gloo has no batched point-to-point
        gradient_accumulation_fusion=False,  # fused_gradients.py turns it on for the weights that train
        bias_dropout_fusion=False,  # without biases and dropout that is one addition, which needs no compiled kernel
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,
    )


def _overlaps_frozen(recipe: Recipe) -> bool:
    sizes = recipe.parallel
    if sizes.overlap_frozen != "auto":
        return sizes.overlap_frozen == "on"
    tokens_travel = sizes.expert * sizes.expert_tensor > 1
    trains_all = recipe.train is not None and recipe.train.trainable == "all"
    return torch.cuda.is_available() and tokens_travel and not trains_all


def _rows_of_an_expert(recipe: Recipe) -> int:
    """Of a micro-batch, on a rank, where every expert gets as many; 0 where nothing is trained."""
    if recipe.train is None or recipe.data is None:
        return 0
    sizes = recipe.parallel
    tokens = recipe.data.seq_length * recipe.train.micro_batch_size // (sizes.context * sizes.tensor)
    return tokens * sizes.expert * sizes.expert_tensor * recipe.model.topk // recipe.model.num_experts


def _recompute(recipe: Recipe) -> dict:
    mode = recipe.train.recompute if recipe.train else "none"
    if mode == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if mode == "selective":
        modules = ["moe"] if recipe.model.num_experts else ["mlp"]
        return dict(recompute_granularity="selective", recompute_modules=modules)
    return {}


def _fp8(recipe: Recipe) -> dict:
    """Megatron's own block enters Transformer Engine's FP8 context for each layer by these; only training has it.

    Parameters stay bfloat16 (`fp8_param`): those in FP8 would be filled slice by slice, each with another scale.
    """
    settings = recipe.fp8
    if settings.recipe == "none" or recipe.train is None:
        return {}
    own = "hybrid" if settings.recipe == "tensorwise" else "e4m3"
    return dict(
        fp8=own if settings.format == "auto" else settings.format,
        fp8_recipe=settings.recipe,
        first_last_layers_bf16=settings.bf16_layers_at_start + settings.bf16_layers_at_end > 0,
        num_layers_at_start_in_bf16=settings.bf16_layers_at_start,
        num_layers_at_end_in_bf16=settings.bf16_layers_at_end,
    )


def _leave_empty(weight: torch.Tensor) -> torch.Tensor:
    return weight
