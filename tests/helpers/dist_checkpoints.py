"""Writes torch_dist checkpoints in any cut, by the format and without Megatron."""

import io
import pickle

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


def write_dist_checkpoint(folder, tensors, cuts=None, files=2, transposed=()):
    """tensors: key -> tensor. cuts: key -> the boxes (offsets, sizes) of its chunks; without it one chunk.
    transposed: keys whose chunks are stored column by column."""
    folder.mkdir(exist_ok=True)
    streams = [io.BytesIO() for _ in range(files)]
    state, storage = {}, {}
    for key, tensor in tensors.items():
        boxes = (cuts or {}).get(key, [((0,) * tensor.ndim, tuple(tensor.shape))])
        for number, (offsets, sizes) in enumerate(boxes):
            chunk = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].contiguous()
            if key in transposed:
                chunk = chunk.transpose(-1, -2).contiguous().transpose(-1, -2)
            blob = io.BytesIO()
            torch.save(chunk.clone(), blob)
            file = (len(storage) + number) % files
            index = MetadataIndex(key, torch.Size(offsets))
            storage[index] = _StorageInfo(f"__{file}_0.distcp", streams[file].tell(), len(blob.getvalue()))
            streams[file].write(blob.getvalue())
        state[key] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype),
            tensor.shape,
            [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes],
        )
    state["decoder.layers.self_attention.linear_qkv._extra_state/shard_0_1"] = BytesStorageMetadata()
    for file, stream in enumerate(streams):
        (folder / f"__{file}_0.distcp").write_bytes(stream.getvalue())
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(state, None, storage)))
    return folder


def grid(shape, counts):
    """Boxes that cut each axis of `shape` into so many equal parts."""
    boxes = [((), ())]
    for size, count in zip(shape, counts, strict=True):
        part = size // count
        boxes = [((*o, part * i), (*s, part)) for o, s in boxes for i in range(count)]
    return boxes


class RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def replace_object(folder, key, content):
    """Put other bytes where a checkpoint holds an object; they go to a file of their own."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = MetadataIndex(key)
    assert index in metadata.storage_data, list(metadata.storage_data)
    (folder / "__9_9.distcp").write_bytes(content)
    metadata.storage_data[index] = _StorageInfo("__9_9.distcp", 0, len(content))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
