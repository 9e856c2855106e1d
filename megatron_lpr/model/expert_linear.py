"""The first linear layer of a new expert, where nothing below it may need a gradient."""

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


class ExpertColumnParallelLinear(ColumnParallelLinear):
    """Megatron's, whose backward pass computes the input's gradient even where the input asks for none.

    That is so in the first layer: everything below its experts is frozen.
    """

    def forward(self, input_: Tensor, *args, **kwargs):
        if input_.requires_grad or args or kwargs:
            return super().forward(input_, *args, **kwargs)
        return F.linear(input_, self.weight), None
