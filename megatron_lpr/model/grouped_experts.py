"""The new experts of a rank: Megatron's loop over them, or torch's grouped products of all at once.

The loop launches some twenty kernels for each expert, forward and backward, and gives each few rows where there are
many experts. Transformer Engine's grouped product is one of cuBLAS for each expert, which chooses anew for each number
of rows. torch's takes all experts at once and chooses nothing, but wants their weights in one tensor: they are copied
together for each product (and not kept for the backward pass), and stay the parameters that checkpoints, Megatron's
optimizer and exports know.
Shapes: T tokens of all experts in their order, N experts, I inputs, O outputs, H hidden, F width.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_lpr.model.transformer_config import LPRTransformerConfig

# Rows x hidden x width of an expert's product: from there on a GPU takes longer for one than the host needs to have the
# next chosen, and cuBLAS adds gradients up where they are kept. An H100 (Transformer Engine 2.11) took for 5 experts of
# 2048 x 5504 with 2,720 rows each 6.6 ms with torch's against 10.5 ms, with 5,440 rows 12.9 against 10.9.
LARGEST = 100_000_000_000

grouped_mm: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)  # older versions of torch have none


def computes_at_once(config: LPRTransformerConfig) -> bool:
    """Whether torch's grouped product computes the new experts of a rank: in bf16, on GPUs that have it."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return False
    return config.params_dtype is torch.bfloat16 and not config.fp8 and suits_grouping(config)


def suits_grouping(config: LPRTransformerConfig) -> bool:
    """The same but for the device and the numbers."""
    hidden, width = config.hidden_size, config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
    is_small = config.rows_of_an_expert * hidden * width <= LARGEST
    begins_right = not hidden % 8 and not width % 8  # rows of the products, at multiples of 16 bytes
    has_several = config.num_moe_experts > config.expert_model_parallel_size
    return grouped_mm is not None and is_small and begins_right and has_several


class GroupedExperts(SequentialMLP):
    """Megatron's SequentialMLP; `is_grouped`: all at once, where that is quicker."""

    def __init__(self, num_local_experts: int, config: LPRTransformerConfig, *args, **kwargs) -> None:
        super().__init__(num_local_experts, config, *args, **kwargs)
        self.is_grouped = computes_at_once(config)

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor):
        if not self.is_grouped or not len(permuted_local_hidden_states):
            if not permuted_probs.is_cuda:
                # a product of two precisions is computed on copies in fp32; frozen experts take them like this too
                permuted_probs = permuted_probs.to(permuted_local_hidden_states.dtype)
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        return self.at_once(permuted_local_hidden_states, tokens_per_expert, permuted_probs), None

    def at_once(self, x_TH: Tensor, tokens_N: Tensor, probs_T: Tensor) -> Tensor:
        """probs * fc2(silu(gate) * up) with [gate; up] = fc1, each token with the weights of its expert."""
        linears = [[getattr(expert, name) for expert in self.local_experts] for name in ("linear_fc1", "linear_fc2")]
        for linear in itertools.chain(*linears):
            # Megatron waits for the weights of its last step there (`overlap_param_gather`); nobody calls these modules
            for hook in linear._forward_pre_hooks.values():
                hook(linear, ())
        ends_N = tokens_N.cumsum(0).to(x_TH.device, torch.int32, non_blocking=True)
        fc1, fc2 = ([linear.weight for linear in of_experts] for of_experts in linears)
        hidden_T2F, probs_T1 = _GroupedLinear.apply(x_TH, ends_N, *fc1), probs_T[:, None]
        if self.config.bias_activation_fusion:  # one kernel, which keeps its input only
            hidden_TF = weighted_bias_swiglu_impl(hidden_T2F, None, probs_T1)
        else:
            gate_TF, up_TF = hidden_T2F.chunk(2, dim=-1)
            hidden_TF = (F.silu(gate_TF) * up_TF * probs_T1).to(x_TH.dtype)
        return _GroupedLinear.apply(hidden_TF, ends_N, *fc2)


class _GroupedLinear(torch.autograd.Function):
    """[T, I], N weights [O, I] -> [T, O]; rows up to ends[n] are expert n's, from those of the expert before on.

    Weights that do not learn have no product for their gradient, and the input is not kept for one.
    """

    @staticmethod
    def forward(ctx, x_TI: Tensor, ends_N: Tensor, *weights_OI: Tensor) -> Tensor:
        assert grouped_mm is not None
        learns = any(weight.requires_grad for weight in weights_OI)
        ctx.save_for_backward(x_TI if learns else None, ends_N, *weights_OI)
        return grouped_mm(x_TI, torch.stack(weights_OI).transpose(1, 2), offs=ends_N)

    @staticmethod
    def backward(ctx, grad_TO: Tensor):
        assert grouped_mm is not None
        x_TI, ends_N, *weights_OI = ctx.saved_tensors
        grad_TO, grad_TI = grad_TO.contiguous(), None
        grads_OI: tuple[Tensor | None, ...] = (None,) * len(weights_OI)
        if ctx.needs_input_grad[0]:
            grad_TI = grouped_mm(grad_TO, torch.stack(weights_OI), offs=ends_N)
        if x_TI is not None:
            grads_OI = grouped_mm(grad_TO.t(), x_TI, offs=ends_N).unbind()
        return grad_TI, None, *grads_OI
