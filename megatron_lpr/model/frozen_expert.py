"""The frozen experts: the original FFN as a plain, replicated MLP that runs where its tokens are.

It needs no gradient buffer, no optimizer state and no weight gradient, so that a replica on every rank costs its
weights alone, and its tokens never enter the dispatcher: expert-parallel ranks stay balanced when the review sends
every original-language token here. Shapes: T tokens of this rank, R those of an expert, H hidden, F FFN width.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_lpr.platform.to_host import ToHost


class DuplicatedLinear(torch.nn.Module):
    """y = x W^T with the whole weight [output, input] on every rank; no bias."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def te_duplicated_linear(input_size: int, output_size: int, *, config: TransformerConfig) -> torch.nn.Module:
    """The same with Transformer Engine (FP8 where the recipe asks for it)."""
    from megatron.core.extensions.transformer_engine import TELinear

    class TEDuplicatedLinear(TELinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    linear = TEDuplicatedLinear(
        input_size,
        output_size,
        parallel_mode="duplicated",
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_bias_add=False,
        skip_weight_param_allocation=False,
    )
    # Transformer Engine marks every weight as a part of one; Megatron would count it once for each tensor-parallel rank
    linear.weight.tensor_model_parallel = False
    return linear


class FrozenExpert(MegatronModule):
    """SwiGLU FFN: fc2(silu(gate) * up) with [gate; up] = fc1, both weights without gradient."""

    def __init__(self, config: TransformerConfig, linear=DuplicatedLinear) -> None:
        super().__init__(config)
        self.linear_fc1 = linear(config.hidden_size, 2 * config.moe_ffn_hidden_size, config=config)
        self.linear_fc2 = linear(config.moe_ffn_hidden_size, config.hidden_size, config=config)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            # `moe_full` trains it after all: each sequence-parallel rank then has a part of its gradient
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x_TH: Tensor) -> Tensor:
        hidden_TF = self.linear_fc1(x_TH)
        if self.config.bias_activation_fusion:  # one kernel, which keeps its input only
            return self.linear_fc2(bias_swiglu_impl(hidden_TF, None))
        gate_TF, up_TF = hidden_TF.chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate_TF) * up_TF)

    def rows_for(self, tokens: int, x_TH: Tensor) -> int:
        """Rows of its products for so many of x's tokens: in FP8 a multiple of 16 (MXFP8: 32), and never none.

        In bf16 and on a GPU at most a 64th of x's tokens more, so that few numbers occur: for each number of rows that
        it has not met cuBLAS chooses a kernel and oneDNN compiles one, which takes longer than ten launches.
        """
        multiple = needed = get_align_size_for_quantization(self.config) if self.config.fp8 else 1
        if x_TH.is_cuda or x_TH.dtype is torch.bfloat16:
            while 2 * multiple <= len(x_TH) // 64:
                multiple *= 2
        tokens = max(tokens, needed) if self.config.fp8 else tokens
        rows = min(-(-tokens // multiple) * multiple, len(x_TH))
        assert rows % needed == 0, f"{len(x_TH)} tokens are too few for {tokens} rows in multiples of {needed}"
        return rows


def add_frozen_experts(
    experts: Iterable[Any], counts_J: ToHost, x_TH: Tensor, probs_TJ: Tensor, chosen_TJ: Tensor
) -> Tensor:
    """sum over frozen experts j of probs[:, j] * FFN_j(x), computed for the tokens that chose j. Returns [T, H].

    Args:
        experts: FrozenExperts (to torch's ModuleList they are any modules).
        counts_J: how many tokens chose each; the host must know, for the products are of so many rows.
        x_TH: FFN inputs of this rank's tokens.
        probs_TJ: renormalised routing weights of the frozen experts, zero where not chosen.
        chosen_TJ: bool.
    """
    output_TH = torch.zeros_like(x_TH)
    of_experts = zip(experts, counts_J.read().tolist(), probs_TJ.split(1, dim=1), chosen_TJ.unbind(1), strict=True)
    for expert, count, probs_T1, chosen_T in of_experts:
        # Those that chose it, in their order; `nonzero` would wait for the device to tell how many there are. Rows
        # beyond them are of tokens that did not, whose weight is zero: no copy is made to pad. No token is there twice,
        # so that a GPU, which adds in no order, gives the same sums each time.
        rows = expert.rows_for(count, x_TH)
        tokens = chosen_T.to(torch.uint8).argsort(descending=True, stable=True)[:rows]
        weight_R1 = probs_T1.index_select(0, tokens).to(x_TH.dtype)
        output_TH = _AddRows.apply(output_TH, tokens, expert(x_TH.index_select(0, tokens)), weight_R1)
    return output_TH


class _AddRows(torch.autograd.Function):
    """sums[tokens] += weight * y, in place: torch's index_add keeps what it adds, of which it needs the shape only."""

    @staticmethod
    def forward(ctx: Any, sums_TH: Tensor, tokens: Tensor, y_RH: Tensor, weight_R1: Tensor) -> Tensor:
        ctx.mark_dirty(sums_TH)
        ctx.save_for_backward(tokens, y_RH, weight_R1)
        return sums_TH.index_add_(0, tokens, y_RH * weight_R1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [grad_TH], (tokens, y_RH, weight_R1) = gradients, ctx.saved_tensors
        grad_RH = grad_TH.index_select(0, tokens)
        of_y = grad_RH * weight_R1 if ctx.needs_input_grad[2] else None
        of_weight = (grad_RH * y_RH).sum(1, keepdim=True) if ctx.needs_input_grad[3] else None
        return grad_TH, None, of_y, of_weight
