"""This rank's rows of a frozen weight in FP8, which FSDP2 gathers as they are: half the bytes of bfloat16.

All rows of a weight have one scale, that of the whole weight, so that what is gathered is the cast of the whole, bit
for bit. The same values transposed, which the gradient of a layer's input reads, cannot be gathered by rows: they are
made where a backward pass has gathered the weight, and let go of with it.
"""

from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megatron_lpr.platform.shards import group_of


@torch.no_grad()
def hold_in_fp8(parameter: Any, quantizer: Any) -> None:
    """Exchange the rows of a sharded parameter for their cast; all ranks of its group call it, in the same order.

    quantizer: Transformer Engine's, of current scaling.
    """
    assert isinstance(parameter, DTensor)
    group: dist.ProcessGroup = group_of(parameter)
    quantizer.with_amax_reduction, quantizer.amax_reduction_group = True, group
    rows = parameter.to_local()
    # FSDP2 wants as many rows on each rank; the last ones have some of zeros, or nothing else
    padded = rows.new_zeros(-(-parameter.shape[0] // group.size()), *parameter.shape[1:])
    padded[: len(rows)] = rows
    parameter._local_tensor = Fp8Rows.of(quantizer(padded))


class Fp8Rows(torch.Tensor):
    """Bytes [rows, columns], and the scale of the whole weight: a shard that says how FSDP2 gathers it.

    To Transformer Engine's own tensor, which knows these hooks too, a gathered weight is transposed or not transposed,
    never both, and what is transposed stays in memory when FSDP2 lets go of the weight.
    """

    # parts of it, and what is computed of it, are plain bytes
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _quantised: Any
    _transposed: torch.Tensor

    @classmethod
    def of(cls, quantised: Any) -> Self:
        """Of Transformer Engine's tensor with these rows."""
        rows: Self = quantised.get_data_tensors()[0].as_subclass(cls)
        rows._quantised = quantised
        return rows

    def get_data_tensors(self) -> tuple[torch.Tensor, None]:
        """As Transformer Engine's tensors: the values, and the same transposed."""
        return self._quantised.get_data_tensors()[0], None

    def get_metadata(self) -> dict[str, Any]:
        """As Transformer Engine's tensors: the scale among others."""
        return self._quantised.get_metadata()

    def dequantize(self) -> torch.Tensor:
        """The values, rounded as they are."""
        return self._quantised.dequantize()

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: torch.nn.Module, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], int]:
        """What FSDP2 gathers, and what it hands to the other hook: how many rows the whole weight has."""
        return (self.get_data_tensors()[0],), outer_size[0]

    def fsdp_post_all_gather(
        self, gathered: tuple[torch.Tensor, ...], rows: int, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Any, tuple[torch.Tensor, ...]] | None:
        """The whole weight, and what FSDP2 frees with it and makes room for when it is gathered again (`out`)."""
        if out is not None:
            self._transpose(out)
            return None
        (values,) = gathered
        self._transposed = values.new_empty(values.shape[1], rows)
        _free(self._transposed)
        return type(self._quantised).make_like(self._quantised, data=values[:rows]), (self._transposed,)

    def _transpose(self, whole: Any) -> None:
        """Fill the place of the transposed values in a backward pass, and take no memory for it in a forward pass."""
        is_backward = torch._C._current_graph_task_id() != -1
        whole._transpose, whole._transpose_invalid = self._transposed, True
        whole.update_usage(columnwise_usage=is_backward)  # a GPU that multiplies without them keeps none
        if whole._transpose is None:
            _free(self._transposed)


def _free(tensor: torch.Tensor) -> None:
    """Until FSDP2 makes room for it again."""
    tensor.untyped_storage().resize_(0)
