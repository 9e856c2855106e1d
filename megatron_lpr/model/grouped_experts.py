"""The new experts of a rank: Megatron's loop over them, or products of all at once.

The loop launches some twenty kernels for each expert, forward and backward, and gives each few rows where there are
many experts. Transformer Engine's grouped product is one of cuBLAS for each expert, which chooses anew for each number
of rows. Here everything but the products themselves is one operation for all experts, and on a GPU the products are too
(expert_products.py); the weights stay the parameters that checkpoints, Megatron's optimizer and exports know.
Shapes: T tokens of all experts in their order, N experts, H hidden, F width.
"""

import itertools

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_lpr.model.even_rows import EvenRows
from megatron_lpr.model.expert_products import ExpertLinear, grouped_mm
from megatron_lpr.model.transformer_config import LPRTransformerConfig

# Rows x hidden x width of an expert's product: from there on a GPU takes longer for one than the host needs to have the
# next chosen, and cuBLAS adds gradients up where they are kept. An H100 (Transformer Engine 2.11) took for 5 experts of
# 2048 x 5504 with 2,720 rows each 6.6 ms with torch's against 10.5 ms, with 5,440 rows 12.9 against 10.9.
LARGEST = 100_000_000_000


def computes_at_once(config: LPRTransformerConfig) -> bool:
    """Whether the new experts of a rank are computed at once: on CPUs, and in bf16 on GPUs with a grouped product."""
    if not torch.cuda.is_available():
        return not config.fp8
    is_able = torch.cuda.get_device_capability() >= (9, 0) and config.params_dtype is torch.bfloat16
    return is_able and not config.fp8 and suits_grouping(config)


def replaces_transformer_engine(config: LPRTransformerConfig) -> bool:
    """Whether that is quicker than Transformer Engine's grouped layer; without a GPU only tests have one, emulated."""
    return torch.cuda.is_available() and computes_at_once(config)


def suits_grouping(config: LPRTransformerConfig) -> bool:
    """Whether torch's grouped product takes such experts, and is quicker."""
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
        x_TH, probs_T = permuted_local_hidden_states, permuted_probs
        if not x_TH.is_cuda:
            # a product of two precisions is computed on copies in fp32; frozen experts take them like this too
            probs_T = probs_T.to(x_TH.dtype)
        if not self.is_grouped or not len(x_TH):
            return super().forward(x_TH, tokens_per_expert, probs_T)
        if x_TH.device.type != "cpu" or x_TH.dtype is not torch.bfloat16:
            return self.at_once(x_TH, tokens_per_expert, probs_T), None
        even = EvenRows(tokens_per_expert)
        return even.gather(self.at_once(even.spread(x_TH), even.rows_N, even.spread(probs_T))), None

    def at_once(self, x_TH: Tensor, tokens_N: Tensor, probs_T: Tensor) -> Tensor:
        """probs * fc2(silu(gate) * up) with [gate; up] = fc1, each token with the weights of its expert."""
        linears = [(expert.linear_fc1, expert.linear_fc2) for expert in self.local_experts]
        for linear in itertools.chain(*linears):
            # Megatron waits for the weights of its last step there (`overlap_param_gather`), and has the next ones
            # gathered, in this order; nobody calls these modules
            for hook in linear._forward_pre_hooks.values():
                hook(linear, ())
        ends_N = tokens_N.cumsum(0).to(torch.int32)
        if x_TH.is_cuda:
            ends_N = ends_N.to(x_TH.device, non_blocking=True)
        fc1, fc2 = ([linear.weight for linear in of_experts] for of_experts in zip(*linears, strict=True))
        hidden_T2F, probs_T1 = ExpertLinear.apply(x_TH, ends_N, *fc1), probs_T[:, None]
        if self.config.bias_activation_fusion:  # one kernel, which keeps its input only
            hidden_TF = weighted_bias_swiglu_impl(hidden_T2F, None, probs_T1)
        else:
            gate_TF, up_TF = hidden_T2F.chunk(2, dim=-1)
            hidden_TF = (F.silu(gate_TF) * up_TF * probs_T1).to(x_TH.dtype)
        return ExpertLinear.apply(hidden_TF, ends_N, *fc2)
