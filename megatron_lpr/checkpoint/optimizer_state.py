"""What the optimizer has learnt of each weight, in boxes that every rank writes and reads by itself.

    optimizer.state.exp_avg.<weight>       Adam's moments, fp32
    optimizer.state.exp_avg_sq.<weight>
    optimizer.state.param.<weight>         the weight in fp32, where the model has it in another precision

Each is a tensor of the shape of the whole weight. A rank of Megatron's distributed optimizer has a range of its slice
of the weight, taken as a row of numbers: a part of a row, whole rows, a part of a row. These are boxes of the whole
tensor, so that no rank asks another when it saves, and one with another range or slice reads the boxes that it needs.
Megatron's own form (fully_reshardable), with the same names, gathers everything on every rank first.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_lpr.checkpoint.boxes import boxes
from megatron_lpr.checkpoint.dist_checkpoint import DistCheckpoint
from megatron_lpr.errors import UserError
from megatron_lpr.files.file_tensor import Shape


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Moments of zero where Adam has made no step yet, as it would begin with."""
    for one in _working(optimizer):
        one.init_state_fn(one.optimizer, one.config)
        if isinstance(one.optimizer, torch.optim.Adam):
            for state in one.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def written_state(
    optimizer: MegatronOptimizer, content: Mapping[str, Any]
) -> tuple[list[WriteItem], list[torch.Tensor]]:
    """What this rank writes of the optimizer's state, and the values, which the optimizer goes on to change.

    content: the weights as Megatron's sharded state, among them all that learn.
    """
    begin_state(optimizer)
    parts = list(_parts(optimizer, content, shared=True))
    return [part.item() for part in parts], [part.values.view(part.sizes) for part in parts]


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, content: Mapping[str, Any], checkpoint: DistCheckpoint, step: int) -> None:
    """Read what this rank needs of the optimizer's state; `step` is the number of updates that it has made.

    Raises:
        UserError: the checkpoint does not hold it, or is damaged.
    """
    begin_state(optimizer)
    for part in _parts(optimizer, content, shared=False):
        part.load(checkpoint)
    for one in _working(optimizer):
        if isinstance(one.optimizer, torch.optim.Adam):
            for state in one.optimizer.state.values():
                state["step"].fill_(step)
        else:  # the FusedAdam of Transformer Engine or Apex
            for group in one.optimizer.param_groups:
                group["step"] = step


class _Part(NamedTuple):
    """A box of a tensor of the checkpoint, and the values there.

    Attributes:
        shape: of the whole tensor, where the same weights of several layers, or experts, are stacked.
        lead: the number of axes that stack them.
    """

    state: str
    weight: str
    shape: Shape
    offsets: Shape
    lead: int
    may_be_padded: bool
    values: torch.Tensor

    @property
    def sizes(self) -> Shape:
        return (1,) * self.lead + tuple(self.values.shape)

    @property
    def key(self) -> str:
        return f"optimizer.state.{self.state}.{self.weight}"

    def item(self) -> WriteItem:
        """As torch's planner describes what is written."""
        offsets, properties = torch.Size(self.offsets), TensorProperties(dtype=self.values.dtype)
        chunk = ChunkStorageMetadata(offsets, torch.Size(self.sizes))
        return WriteItem(
            MetadataIndex(self.key, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, torch.Size(self.shape)),
        )

    def load(self, checkpoint: DistCheckpoint) -> None:
        """Fill the values; those of padding, which a checkpoint of another layout may not have, stay."""
        has_it = self.key in checkpoint.metadata.state_dict_metadata
        stored = checkpoint.tensor(self.key, self.offsets[: self.lead]) if has_it else None
        if not stored or (stored.shape != self.shape[self.lead :] and not self.may_be_padded):
            raise UserError(
                f"checkpoint {checkpoint.folder}: has no optimizer state of {self.weight} in the shape "
                f"{list(self.shape)}; take its weights with model.load"
            )
        spans = zip(self.offsets[self.lead :], self.values.shape, stored.shape, strict=True)
        box = [(min(first, there), min(first + size, there)) for first, size, there in spans]
        values = self.values[tuple(slice(0, stop - first) for first, stop in box)]
        if values.numel():
            values.copy_(stored.read(box))


def _parts(optimizer: MegatronOptimizer, content: Mapping[str, Any], *, shared: bool) -> Iterator[_Part]:
    """The state that this rank has; shared: of what several ranks have, the part that is this one's to write."""
    entries = {id(entry.data): entry for entry in nested_values(content) if hasattr(entry, "data")}
    for one in _working(optimizer):
        is_whole = not isinstance(one, DistributedOptimizer)
        for weight, start, main in _owned(one):
            state = {name: one.optimizer.state[main][name] for name in ("exp_avg", "exp_avg_sq")}
            if weight.dtype != torch.float32:
                state["param"] = main
            for piece in _pieces(entries[id(weight)]):
                *copies, rank = piece.replica_id  # of pipeline and tensor parallelism; of data parallelism
                if shared and any(copies):
                    continue
                place = piece.data.storage_offset() - weight.storage_offset()
                first, stop = max(start, place), min(start + main.numel(), place + piece.data.numel())
                if shared and is_whole:
                    ranks, count = _data_parallel_size(weight), stop - first
                    first, stop = first + count * rank // ranks, first + count * (rank + 1) // ranks
                for name, values in state.items():
                    flat = values.detach().view(-1)[first - start : max(first, stop) - start]
                    yield from _boxed(name, piece, first - place, flat)


def _boxed(state: str, piece: ShardedTensor, start: int, flat: torch.Tensor) -> Iterator[_Part]:
    """flat: values of the piece, the first of which is number `start` there."""
    lead, taken = piece.prepend_axis_num, 0
    for offsets, sizes in boxes(tuple(piece.data.shape), start, start + flat.numel()):
        size = math.prod(sizes)
        places = itertools.zip_longest(piece.global_offset, (0,) * lead + offsets)
        yield _Part(
            state=state,
            weight=piece.key,
            shape=tuple(piece.global_shape),
            offsets=tuple(one + other for one, other in places),
            lead=lead,
            may_be_padded=piece.allow_shape_mismatch,
            values=flat[taken : taken + size].view(sizes),
        )
        taken += size


def _working(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers of this rank that have something to learn: a pipeline stage may have nothing that trains."""
    return (one for one in optimizer.chained_optimizers if not getattr(one, "is_stub_optimizer", False))


def _owned(one: Any) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
    """The weights that one of Megatron's optimizers updates here: each with the first number that is this rank's, and
    the tensor that Adam works on, from there on."""
    if isinstance(one, DistributedOptimizer):
        # not by model_param_group_index_map: of weights of two precisions in a group, that counts in another order
        copies = zip(one.model_float16_groups, one.shard_fp32_from_float16_groups, strict=True)
        themselves = zip(one.model_fp32_groups, one.shard_fp32_groups, strict=True)
        for groups in (*copies, *themselves):
            for weight, main in zip(*groups, strict=True):
                yield weight, one._get_model_param_range_map(weight)["param"].start, main
    elif hasattr(one, "float16_groups"):
        copies = zip(one.float16_groups, one.fp32_from_float16_groups, strict=True)
        for weight, main in (pair for groups in copies for pair in zip(*groups, strict=True)):
            yield weight, 0, main
        for weight in itertools.chain(*one.fp32_from_fp32_groups):
            yield weight, 0, weight
    else:
        for weight in one.get_parameters():
            yield weight, 0, weight


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[ShardedTensor]:
    """A weight's slice, cut where its parts lie apart in the whole one: the two matrices of a gated layer."""
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    for piece in nested_values(built):
        assert piece.data.is_contiguous(), f"{piece.key} is not cut by rows"
        assert piece.data.untyped_storage().data_ptr() == entry.data.untyped_storage().data_ptr(), piece.key
        yield piece


def _data_parallel_size(weight: torch.nn.Parameter) -> int:
    if getattr(weight, "allreduce", True):
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_world_size()
