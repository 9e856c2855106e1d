"""Hugging Face checkpoints as streams: a lazy reader, and a writer that never holds more than one tensor.

The writer is told every name and shape before the first byte, as the family tables give them. So shards are
laid out once, tensors may come in any order, and a checkpoint that lacks a tensor cannot be closed.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lpr.errors import UserError
from megatron_lpr.files.file_tensor import FileTensor, Shape, tensor_bytes, write_at

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a configuration value; UserError for one that checkpoints are not written in."""
    if name not in DTYPES:
        raise UserError(f"dtype '{name}' is not supported for a checkpoint; valid: {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_on_disk(folder: str | Path) -> str:
    """Name of the dtype of a checkpoint's first tensor; float32 where there is no tensor yet."""
    if not any((Path(folder) / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        return "float32"
    reader = SafetensorsReader(folder)
    if not reader.keys():
        return "float32"
    dtype = reader.dtype(reader.keys()[0])
    return next(name for name, known in DTYPES.items() if known == dtype)


def read_header(path: Path) -> dict[str, Any]:
    """A file's header: dtype, shape and byte range in the file (`start`) of each tensor. UserError if it is damaged."""
    try:
        with open(path, "rb") as opened:  # first: to the library one without that right is missing
            safe_open(str(path), framework="pt")  # the library knows best whether a file is sound
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(size))
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is damaged or truncated ({error}): download it again") from error
    header.pop("__metadata__", None)
    return {name: entry | {"start": 8 + size + entry["data_offsets"][0]} for name, entry in header.items()}


class SafetensorsReader:
    """The tensors of a HF folder by name, from `model.safetensors` or from the shards of its index.

    Opens and reads nothing but what is asked for. UserError for a folder without safetensors or with two models, a
    shard that is missing, truncated or outside the folder, and a tensor that is not there or not in a floating-point
    format that training starts from.

    Attributes:
        bytes_read: of tensors, so far.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.bytes_read = 0
        self._headers: dict[str, dict[str, Any]] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if not index.is_file():
            if not single.is_file():
                raise UserError(
                    f"'{self.folder}' holds neither {SINGLE_FILE} nor {INDEX_FILE}: "
                    "download the model in safetensors format"
                )
            return dict.fromkeys(self._header(SINGLE_FILE), SINGLE_FILE)
        if single.exists():
            raise UserError(
                f"'{self.folder}' holds two models, {SINGLE_FILE}, which transformers reads, and the shards of "
                f"{INDEX_FILE}: remove the one that is not meant"
            )
        return self._read_index(index)

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"'{index}' is not a safetensors index: download the model again") from error
        if not isinstance(file_of, dict) or not file_of:
            raise UserError(f"'{index}' is not a safetensors index: its weight_map names no tensors")
        for shard in sorted(set(map(str, file_of.values()))):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise UserError(f"'{index}' names '{shard}': a shard is a .safetensors file inside the folder")
            if not (self.folder / shard).is_file():
                raise UserError(f"'{self.folder}' lacks the shard {shard} that its index names: download it again")
        return file_of

    def check_index(self) -> None:
        """UserError where a shard holds a tensor that the index does not find in it: transformers reads it there."""
        for file in sorted(self.files()):
            for name in self._header(file):
                if name in self._file_of and self._file_of[name] != file:
                    raise UserError(
                        f"'{self.folder}' holds the tensor '{name}' twice, in {file} and, by its index, in "
                        f"{self._file_of[name]}: remove the one that is not meant"
                    )
                if name not in self._file_of and not name.endswith("rotary_emb.inv_freq"):
                    raise UserError(f"'{self.folder / file}' holds the tensor '{name}', which its index does not name")

    def files(self) -> set[str]:
        """Names of the safetensors files, without the index."""
        return set(self._file_of.values())

    def _header(self, file: str) -> dict[str, Any]:
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self._headers[file]

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._file_of:
            raise UserError(f"'{self.folder}' holds no tensor '{name}'")
        file = self._file_of[name]
        if name not in self._header(file):
            raise UserError(f"'{self.folder / file}' lacks the tensor '{name}' that the index names: download it again")
        return self._header(file)[name]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def keys(self) -> list[str]:
        return list(self._file_of)

    def slice(self, name: str) -> FileTensor:
        """A tensor still on disk: `[a:b]` reads that part and nothing else."""
        entry = self._entry(name)
        file, shape = self.folder / self._file_of[name], tuple(entry["shape"])
        return FileTensor(file, entry["start"], self.dtype(name), shape, self._count)

    def _count(self, number_of_bytes: int) -> None:
        self.bytes_read += number_of_bytes

    def get(self, name: str) -> torch.Tensor:
        return self.slice(name)[:]

    def shape(self, name: str) -> Shape:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        code = self._entry(name)["dtype"]
        if code not in _CODES:
            raise UserError(f"tensor '{name}' of '{self.folder}' is {code}; supported: {', '.join(_CODES)}")
        return _CODES[code]


class ShardedWriter:
    """Writes a safetensors checkpoint of one dtype, tensor by tensor, straight to its place in its shard.

    shapes: every tensor of the checkpoint, in file order. A shard holds at most `max_shard_bytes` of tensors
    (a larger tensor gets a shard of its own). UserError when the disk is full, and on `close()` when a tensor was
    never written.

    sizes: bytes of each tensor.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, max_shard_bytes: int
    ):
        if max_shard_bytes < 1:
            raise UserError(f"a shard of at most {max_shard_bytes} bytes: give a positive number")
        self.folder, self._dtype = folder, dtype
        self._shapes = dict(shapes)
        self.sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
        self._missing = set(shapes)
        self._place: dict[str, tuple[str, int]] = {}
        total, free = sum(self.sizes.values()), shutil.disk_usage(folder).free
        if total > free:
            raise UserError(
                f"'{folder.parent}' has {free / 1e9:.1f} GB free, the checkpoint needs {total / 1e9:.1f} GB"
            )
        shards = list(self._plan(max_shard_bytes))
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            self._start_shard(SINGLE_FILE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors", names)

    def _plan(self, max_shard_bytes: int) -> Iterator[list[str]]:
        names: list[str] = []
        used = 0
        for name, size in self.sizes.items():
            if names and used + size > max_shard_bytes:
                yield names
                names, used = [], 0
            names.append(name)
            used += size
        yield names

    def _start_shard(self, file: str, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + self.sizes[name]
            header[name] = {
                "dtype": _CODE_OF[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(self.folder / file, "wb") as shard:
            shard.write(struct.pack("<Q", len(encoded)) + encoded)
            start = shard.tell()
            shard.truncate(start + offset)
        for name in names:
            self._place[name] = (file, start + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: torch.Tensor | FileTensor) -> None:
        """Writes a tensor, cast to the checkpoint's dtype; one on disk is copied there. Each name is written once."""
        assert name in self._missing, f"'{name}' is not a tensor of this checkpoint or was written before"
        assert tuple(tensor.shape) == tuple(self._shapes[name]), (name, tensor.shape, self._shapes[name])
        file, offset = self._place[name]
        try:
            with open(self.folder / file, "r+b", buffering=0) as shard:
                if isinstance(tensor, FileTensor):
                    tensor.copy_to(shard.fileno(), offset, self._dtype)
                else:
                    write_at(shard.fileno(), tensor_bytes(tensor.to(self._dtype)), offset)
        except OSError as error:
            raise UserError(f"cannot write '{self.folder / file}': {error.strerror}") from error
        self._missing.remove(name)

    def close(self) -> None:
        """Checks that every tensor was written and is on the disk; writes the index for more than one shard."""
        if self._missing:
            raise UserError(
                f"the checkpoint is incomplete: {len(self._missing)} of {len(self._shapes)} tensors "
                f"were never written, the first is '{min(self._missing)}'"
            )
        files = {name: file for name, (file, _) in self._place.items()}
        for file in sorted(set(files.values())):
            with open(self.folder / file, "rb") as shard:
                os.fsync(shard.fileno())
        if len(set(files.values())) > 1:
            index = {"metadata": {"total_size": sum(self.sizes.values())}, "weight_map": files}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
