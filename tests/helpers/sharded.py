"""Whole tensors of a model, put together from what the ranks of any layout hold.

The pieces are found as a checkpoint finds them, by each parameter's sharded state, so that names, shapes and offsets
are global ones. Several ranks may hold the same piece: they must agree on it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Piece = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]  # global name, global shape, offset, values
VOCABULARY = 257
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def gradient_pieces(trainer) -> list[Piece]:
    """This rank's pieces of the gradients of all trainable parameters, after a step."""
    for chunk in trainer.chunks:
        _gather_over_data_parallel(chunk)
    models = [chunk.module for chunk in trainer.chunks]
    return _pieces(models, lambda parameter: parameter.main_grad if parameter.requires_grad else None)


def weight_pieces(chunks: list[torch.nn.Module]) -> list[Piece]:
    """This rank's pieces of all parameters."""
    return _pieces(chunks, lambda parameter: parameter.detach())


def _pieces(models: list[torch.nn.Module], values_of: Callable[[torch.nn.Parameter], Tensor | None]) -> list[Piece]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

    from megatron_lpr.checkpoint.row_shards import sharded_state
    from megatron_lpr.platform.shards import is_sharded

    found = []
    for model in models:
        kept: dict = {}
        whole = {name: p for name, p in model.named_parameters() if not is_sharded(p)}
        rows = {name for name, p in model.named_parameters() if name not in whole and values_of(p) is not None}
        values = {p.data_ptr(): values_of(p) for p in whole.values() if values_of(p) is not None}
        for name, entry in sharded_state(model).items():
            if name in rows:
                kept[name] = entry
            elif isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data.data_ptr() in values:
                entry.data = values.pop(entry.data.data_ptr())
                kept[name] = entry
        assert not values, "parameters without a sharded state"
        apply_factories(kept)
        for part in nested_values(kept):
            # values of a piece may have fewer dimensions: the leading ones are layers or experts
            found.append((part.key, part.global_shape, part.global_offset, part.data.detach().cpu().clone().numpy()))
    return found


def _gather_over_data_parallel(chunk) -> None:
    """The distributed optimizer leaves each rank with its shard of the summed gradients."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        for bucket in buffer.buckets:
            size, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
            shard = bucket.grad_data.chunk(size)[rank].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=buffer.data_parallel_group)


def assemble(by_rank: list[list[Piece]], *, exact: bool = False) -> dict[str, np.ndarray]:
    """Whole tensors from the pieces of all ranks, without the rows that pad the vocabulary (their number depends on
    the tensor-parallel size). Replicas are equal to rounding, or (`exact`) in every bit."""
    whole: dict[str, np.ndarray] = {}
    for key, shape, offset, values in (piece for rank in by_rank for piece in rank):
        tensor = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float64))
        values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
        place = tensor[tuple(slice(at, at + n) for at, n in zip(offset, values.shape, strict=True))]
        if not np.isnan(place).all():
            tolerance = 0 if exact else 1e-6 * np.abs(place).max()
            np.testing.assert_allclose(values, place, rtol=0, atol=tolerance, err_msg=key)
        place[...] = values
    for key, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"{key}: parts of it are nowhere"
    return {key: tensor[:VOCABULARY] if key in PADDED else tensor for key, tensor in whole.items()}
