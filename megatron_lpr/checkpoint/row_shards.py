"""What a checkpoint gets of a parameter whose rows are spread over ranks: from each rank its own rows, once.

Megatron places whole parameters. It is shown stand-ins of the whole shape that take no memory, and each place that it
gives them is cut to the rows that this rank has. Reading them is not its business either (model/load/row_shards.py).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_lpr.platform.shards import group_of, is_quantised, is_sharded, own_part, own_rows


def sharded_state(model: Any) -> dict[str, Any]:
    """`model.sharded_state_dict()`, and in place of each sharded parameter this rank's own rows of it, as a list.

    Of quantised rows, which no checkpoint holds, it has the stand-ins.
    """
    sharded = {name: p for name, p in model.named_parameters() if is_sharded(p) and not is_quantised(p)}
    with _stand_ins(model):
        state = dict(model.sharded_state_dict())
    for name, parameter in sharded.items():
        state[name] = list(_own(state[name], parameter))
    return state


@contextlib.contextmanager
def _stand_ins(model: torch.nn.Module) -> Iterator[None]:
    taken = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_sharded(parameter):
                taken.append((module, name, parameter))
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module.register_parameter(name, torch.nn.Parameter(whole, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in taken:
            module.register_parameter(name, parameter)


def _own(entry: ShardedTensor | ShardedTensorFactory, parameter: Any) -> Iterator[ShardedTensor]:
    """The parts of a parameter's place that this rank fills; each rank has others."""
    rows, mine = own_rows(parameter), own_part(parameter).detach()
    # a factory cuts the parameter in parts that lie apart in the checkpoint: the gate and up projections of SwiGLU
    parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    covered, start = _spreads_over_tensor_ranks(parameter), 0
    for part in parts:
        stop = start + part.local_shape[0]
        first, last = max(rows.start, start), min(rows.stop, stop)
        if first < last:
            offset, axis = list(part.global_offset), part.prepend_axis_num
            offset[axis] += first - start
            # with the leading axes of its own: Megatron leaves them out where ranks have unequal parts
            data = mine[first - rows.start : last - rows.start][(None,) * axis]
            copy, tensor, _ = part.replica_id  # the last tells the copies apart that are none any more
            yield replace(
                part,
                data=data,
                local_shape=tuple(data.shape),
                global_offset=tuple(offset),
                prepend_axis_num=0,
                axis_fragmentations=None,  # not all ranks have as many
                replica_id=(copy, 0 if covered else tensor, 0),
            )
        start = stop


def _spreads_over_tensor_ranks(parameter: Any) -> bool:
    ranks = set(dist.get_process_group_ranks(group_of(parameter)))
    return set(dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())) <= ranks
