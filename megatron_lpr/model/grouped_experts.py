"""The new experts of a rank without Transformer Engine: Megatron's loop over them, or grouped products of all at once.

The loop launches some twenty kernels for each expert, forward and backward, and gives each few rows where there are
many experts. torch's grouped product takes all experts at once, but wants their weights in one tensor, which is copied
together here: they stay the parameters that checkpoints, Megatron's optimizer and exports know. So it is for experts
that are copied (12 bytes for each of hidden x width in bf16, there and back) in less time than their kernels are
launched: from the H100's 3.35 TB/s and 4 microseconds a launch, up to 22 million; half of that is the limit.
Shapes: T tokens of all experts in their order, N experts, H hidden, F width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

LARGEST = 11_000_000  # hidden x width of an expert

grouped_mm: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)  # older versions of torch have none


class GroupedExperts(SequentialMLP):
    """Megatron's SequentialMLP; on a GPU all at once where that is quicker."""

    @property
    def is_grouped(self) -> bool:
        """Whether its experts are computed at once."""
        weight = self.local_experts[0].linear_fc2.weight
        is_on_gpu = weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (9, 0)
        return is_on_gpu and weight.dtype is torch.bfloat16 and self.suits_grouping

    @property
    def suits_grouping(self) -> bool:
        """The same but for the device."""
        hidden, width = self.local_experts[0].linear_fc2.weight.shape
        # rows of the products begin at multiples of 16 bytes
        has_right_size = hidden * width <= LARGEST and not hidden % 8 and not width % 8
        return grouped_mm is not None and self.num_local_experts > 1 and has_right_size

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor):
        if not self.is_grouped or not len(permuted_local_hidden_states):
            if not permuted_probs.is_cuda:
                # a product of two precisions is computed on copies in fp32; frozen experts take them like this too
                permuted_probs = permuted_probs.to(permuted_local_hidden_states.dtype)
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        return self.at_once(permuted_local_hidden_states, tokens_per_expert, permuted_probs), None

    def at_once(self, x_TH: Tensor, tokens_N: Tensor, probs_T: Tensor) -> Tensor:
        """probs * fc2(silu(gate) * up) with [gate; up] = fc1, each token with the weights of its expert."""
        assert grouped_mm is not None
        ends_N = tokens_N.cumsum(0).to(x_TH.device, torch.int32, non_blocking=True)
        fc1_NHF, fc2_NFH = (
            torch.stack([getattr(expert, layer).weight for expert in self.local_experts]).transpose(1, 2)
            for layer in ("linear_fc1", "linear_fc2")
        )
        gate_TF, up_TF = grouped_mm(x_TH, fc1_NHF, offs=ends_N).chunk(2, dim=-1)
        hidden_TF = (F.silu(gate_TF) * up_TF * probs_T[:, None]).to(x_TH.dtype)
        output_TH = grouped_mm(hidden_TF, fc2_NFH, offs=ends_N)
        if output_TH.requires_grad:
            output_TH.register_hook(Tensor.contiguous)  # its backward pass refuses other strides
        return output_TH
