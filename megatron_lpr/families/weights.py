"""The weights of a base model under the names of its family's table, whatever they are called and joined on disk."""

from pathlib import Path
from typing import NamedTuple

import torch

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, family_of
from megatron_lpr.files.file_tensor import FileTensor, Shape
from megatron_lpr.files.safetensors_io import SafetensorsReader


def open_weights(folder: str | Path, arch: Architecture) -> SafetensorsReader:
    """The tensors of a model folder whose config.json says `arch`."""
    return _PartsReader(folder, _parts(arch)) if family_of(arch).dense.joined else SafetensorsReader(folder)


class _Part(NamedTuple):
    """Rows `start` to `stop` of a tensor on disk, which has `rows`."""

    whole: str
    start: int
    stop: int
    rows: int


def _parts(arch: Architecture) -> dict[str, _Part]:
    """What lies on disk joined to others, by name; models with experts are read from classes that join nothing."""
    family, found = family_of(arch), {}
    shapes = family.shapes(arch)
    for layer in range(arch.num_layers):
        for whole, names in family.dense.joined.items():
            lengths = [shapes[f"model.layers.{layer}.{name}"][0] for name in names]
            for position, name in enumerate(names):
                start = sum(lengths[:position])
                part = _Part(f"model.layers.{layer}.{whole}", start, start + lengths[position], sum(lengths))
                found[f"model.layers.{layer}.{name}"] = part
    return found


class _PartsReader(SafetensorsReader):
    """Rows of a joined tensor are a tensor of their own here; nothing else is different."""

    def __init__(self, folder: str | Path, parts: dict[str, _Part]):
        super().__init__(folder)
        self._parts, self._wholes = parts, {part.whole for part in parts.values()}
        for name in self._parts.keys() & self._file_of.keys():
            raise UserError(f"'{self.folder}' holds the tensor '{name}', which belongs into its '{parts[name].whole}'")

    def __contains__(self, name: str) -> bool:
        if name in self._parts:
            return self._parts[name].whole in self._file_of
        return name in self._file_of and name not in self._wholes

    def keys(self) -> list[str]:
        parts = [name for name in self._parts if name in self]
        return [name for name in super().keys() if name not in self._wholes] + parts

    def slice(self, name: str) -> FileTensor:
        if name not in self._parts:
            return super().slice(name)
        whole, start, stop, rows = self._parts[name]
        tensor = super().slice(whole)
        if tensor.shape[:1] != (rows,):
            raise UserError(
                f"tensor '{whole}' of '{self.folder}' has shape {tensor.shape}, but its config says {rows} rows"
            )
        return tensor.rows(start, stop)

    def shape(self, name: str) -> Shape:
        return self.slice(name).shape if name in self._parts else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return super().dtype(self._parts[name].whole if name in self._parts else name)
