"""Parameters of a Megatron distributed checkpoint (torch_dist), read without Megatron, a model or process groups.

A checkpoint of any layout holds the same global tensors, cut into other chunks:

    embedding.word_embeddings.weight              [V, H]
    decoder.layers.mlp.router.weight              [layers, E, H]            all layers alike, stacked
    decoder.layers.3.mlp.router.weight            [E, H]                    layers that differ, one by one
    decoder.layers.mlp.experts.experts.linear_fc1.weight  [layers, experts, 2F, H]

Each becomes the parameters that a model has (`decoder.layers.3.mlp.experts.local_experts.0.linear_fc1.weight`), and of
those only the rows that are asked for are read, from the chunks that hold them.
"""

import itertools
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_lpr.checkpoint.metadata_file import read_metadata
from megatron_lpr.checkpoint.run_state import refuse_gone
from megatron_lpr.errors import UserError
from megatron_lpr.files.file_tensor import FileTensor, Shape

Span = tuple[int, int]  # first and last but one
_ONE_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_ALL_LAYERS = re.compile(r"decoder\.layers\.(.+)")
_ALL_EXPERTS = re.compile(r"mlp\.experts\.experts\.(.+)")


class _Place(NamedTuple):
    """A parameter: the tensor of the checkpoint it is part of, and its index on the leading axes there."""

    key: str
    lead: tuple[int, ...]


class DistCheckpoint(Mapping[str, "StoredParameter"]):
    """The weights of a checkpoint folder by global parameter name, in the model's order; reading one is up to the user.

    The optimizer's state is passed over. UserError when the folder is no torch_dist checkpoint.

    Attributes:
        metadata: what `read_metadata` has found.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._reader = FileSystemReader(self.folder)
        self.metadata = read_metadata(self.folder)
        self._opened: dict[MetadataIndex, FileTensor] = {}
        self._tensors = {
            key: tensor
            for key, tensor in self.metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        self._places = {
            name: place
            for key, tensor in self._tensors.items()
            if not key.startswith("optimizer.state.")
            for name, place in _unstack(key, tuple(tensor.size))
        }
        self._chunks: dict[tuple[str, int], dict[Shape, list[ChunkStorageMetadata]]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> "StoredParameter":
        return self.tensor(*self._places[name])

    def tensor(self, key: str, lead: Shape = ()) -> "StoredParameter":
        """A tensor of the checkpoint, of the optimizer's too; or what it has at an index of its leading axes."""
        tensor, axes = self._tensors[key], len(lead)
        shards = [
            _Shard(
                tuple(chunk.offsets[axes:]),
                tuple(chunk.sizes[axes:]),
                MetadataIndex(key, chunk.offsets),
                tuple(index - first for index, first in zip(lead, chunk.offsets, strict=False)),
            )
            for chunk in self._chunks_by_lead(key, axes).get(lead, ())
        ]
        return StoredParameter(self, key, tuple(tensor.size[axes:]), tensor.properties.dtype, tuple(shards))

    def _chunks_by_lead(self, key: str, axes: int) -> dict[Shape, list[ChunkStorageMetadata]]:
        """The chunks of a tensor by each index of its leading axes; there may be thousands, asked for as often."""
        if (key, axes) not in self._chunks:
            chunks = self._chunks[key, axes] = {}
            for chunk in self._tensors[key].chunks:
                spans = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
                for lead in itertools.product(*(range(first, first + size) for first, size in spans)):
                    chunks.setdefault(lead, []).append(chunk)
        return self._chunks[key, axes]

    def open_chunk(self, index: MetadataIndex) -> FileTensor | torch.Tensor:
        """A chunk where it lies in its file; in memory if it was saved transposed. UserError when it is damaged."""
        if index in self._opened:
            return self._opened[index]
        info = self.metadata.storage_data[index]
        path = self.folder / info.relative_path
        try:
            if path.stat().st_size < info.offset + info.length:
                raise UserError(f"checkpoint {self.folder}: {info.relative_path} is truncated; copy it again")
            with open(path, "rb") as file:
                # torch.load reads everything but the values, and tells where those begin
                found = torch.load(self._reader._slice_file(file, info), map_location="meta", weights_only=True)
                start = getattr(found.untyped_storage(), "_checkpoint_offset", None)
                if start is None or not found.is_contiguous() or found.storage_offset():
                    return torch.load(self._reader._slice_file(file, info), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            refuse_gone(self.folder)
            reason = getattr(error, "strerror", None) or "its content is damaged"
            raise UserError(f"checkpoint {self.folder}: {info.relative_path} cannot be read: {reason}") from error
        self._opened[index] = FileTensor(path, info.offset + start, found.dtype, tuple(found.shape))
        return self._opened[index]


class _Shard(NamedTuple):
    """The part of a parameter that one chunk holds, and where that is in the chunk."""

    offsets: Shape
    sizes: Shape
    chunk: MetadataIndex
    lead: tuple[int, ...]


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of a checkpoint, whole, however many ranks wrote it."""

    checkpoint: DistCheckpoint
    key: str  # of the tensor that it is, or is part of
    shape: Shape
    dtype: torch.dtype
    shards: tuple[_Shard, ...]

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """As torch.Tensor.narrow, in the dtype of the checkpoint; chunks beside the range are not read."""
        wanted = [(0, size) for size in self.shape]
        wanted[dim] = (start, start + length)
        return self.read(wanted)

    def read(self, wanted: list[Span]) -> torch.Tensor:
        """A box: first and last but one of each axis; rows beside it are not read."""
        found = [(shard, box) for shard in self.shards if (box := _overlap(shard, wanted))]
        if len(found) == 1 and found[0][1] == wanted:
            return self._read(found[0][0], wanted)
        whole = torch.empty([stop - first for first, stop in wanted], dtype=self.dtype)
        filled = 0
        for shard, box in found:
            part = self._read(shard, box)
            target = whole[tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(box, wanted, strict=True))]
            target.copy_(part)
            filled += part.numel()
        if filled != whole.numel():
            raise UserError(f"checkpoint {self.checkpoint.folder}: parts of '{self.key}' are missing")
        return whole

    def on_disk(self, dim: int, start: int, length: int) -> FileTensor | None:
        """What `narrow` would read, where it lies in one piece in a file; None where it does not."""
        wanted = [(0, size) for size in self.shape]
        wanted[dim] = (start, start + length)
        first, stop = wanted[0]
        for shard in self.shards:
            if _overlap(shard, wanted) == wanted and wanted[1:] == [(0, size) for size in shard.sizes[1:]]:
                chunk = self._opened(shard)
                if isinstance(chunk, FileTensor):
                    return chunk.rows(first - shard.offsets[0], stop - shard.offsets[0])
        return None

    def _read(self, shard: _Shard, box: list[Span]) -> torch.Tensor:
        part: FileTensor | torch.Tensor = self._opened(shard)
        for dim, ((first, stop), offset) in enumerate(zip(box, shard.offsets, strict=True)):
            part = part.narrow(dim, first - offset, stop - first)  # the first reads, of a file
        assert isinstance(part, torch.Tensor)
        return part

    def _opened(self, shard: _Shard) -> FileTensor | torch.Tensor:
        chunk = self.checkpoint.open_chunk(shard.chunk)
        for index in shard.lead:
            chunk = chunk.select(0, index)
        return chunk


def _overlap(shard: _Shard, wanted: list[Span]) -> list[Span] | None:
    box = [
        (max(first, offset), min(stop, offset + size))
        for (first, stop), offset, size in zip(wanted, shard.offsets, shard.sizes, strict=True)
    ]
    return box if all(first < stop for first, stop in box) else None


def _unstack(key: str, size: Shape) -> Iterator[tuple[str, _Place]]:
    """The parameters that a tensor of the checkpoint holds, by the names that a whole model has for them."""
    if one := _ONE_LAYER.fullmatch(key):
        number = int(one[1])
        layers, rest, lead = range(number, number + 1), one[2], 0
    elif every := _ALL_LAYERS.fullmatch(key):
        layers, rest, lead = range(size[0]), every[1], 1
    else:
        yield key, _Place(key, ())
        return
    experts = _ALL_EXPERTS.fullmatch(rest)
    names = [rest]
    if experts:
        names = [f"mlp.experts.local_experts.{expert}.{experts[1]}" for expert in range(size[lead])]
    for (number, layer), (expert, name) in itertools.product(enumerate(layers), enumerate(names)):
        place = (number,) * lead + (expert,) * bool(experts)
        yield f"decoder.layers.{layer}.{name}", _Place(key, place)
