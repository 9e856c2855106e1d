"""Where the tensors of an export come from: a checkpoint, or a base model that is upcycled on the way.

A source is a list of units, each of which gives some HF tensors. Any process can stream any of them, so that several
can share the work; a source crosses to them by pickle and takes no open file along.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from megatron_lpr.checkpoint.dist_checkpoint import DistCheckpoint
from megatron_lpr.conversion.export.to_hf import has_shape_of, hf_names, to_hf
from megatron_lpr.conversion.load.upcycle import check_checkpoint
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, family_of
from megatron_lpr.families.origins import initial_tensor, origins, zero_tensors
from megatron_lpr.files.file_tensor import FileTensor
from megatron_lpr.files.safetensors_io import SafetensorsReader


class Source(Protocol):
    """units: name of each -> the HF tensors that it gives, in the order in which they are best read."""

    units: Mapping[str, list[str]]

    def stream(self, units: Iterable[str]) -> Iterator[tuple[str, torch.Tensor | FileTensor]]: ...


class UpcycledSource:
    """A HF model upcycled as it is read; a unit is a tensor of the result. UserError: see `check_checkpoint`."""

    def __init__(self, base_dir: str | Path, arch: Architecture, *, num_experts: int, router_std: float, seed: int):
        self._reader, self._arch = SafetensorsReader(base_dir), arch
        check_checkpoint(self._reader, arch)
        self._options = {"num_experts": num_experts, "router_std": router_std, "seed": seed}
        self._origins = origins(arch, num_experts)
        self.units = {name: [name] for name in self._origins}

    def stream(self, units: Iterable[str]) -> Iterator[tuple[str, torch.Tensor | FileTensor]]:
        for name in units:
            origin = self._origins[name]
            if origin.kind == "copy":
                yield name, self._reader.slice(origin.base)
            else:
                yield name, initial_tensor(name, origin, self._reader, self._arch, **self._options)


class CheckpointSource:
    """A Megatron distributed checkpoint of any layout; a unit is one of its parameters.

    arch: of the base model. UserError when the checkpoint does not hold exactly what a model of this architecture
    with `num_experts` experts (0: dense), `num_frozen` of them frozen, is made of.
    """

    def __init__(self, folder: str | Path, arch: Architecture, *, num_experts: int, num_frozen: int):
        self._checkpoint, self._num_frozen = DistCheckpoint(folder), num_frozen
        self._arch = arch
        names = {name: hf_names(name, arch, num_frozen=num_frozen) for name in self._checkpoint}
        for name, tensors in names.items():
            if not tensors or not has_shape_of(self._checkpoint[name], name, arch, num_experts=num_experts):
                raise UserError(
                    f"checkpoint {folder}: its parameter '{name}' {list(self._checkpoint[name].shape)} has no place in "
                    f"a {arch.family} model like the base: was it trained from another one?"
                )
        self._zeros = dict(zero_tensors(arch, num_experts))
        shapes = family_of(arch).shapes(arch, num_experts)
        given = {tensor for tensors in names.values() for tensor in tensors} | self._zeros.keys()
        missing = [name for name in shapes if name not in given]
        unexpected = [name for name in given if name not in shapes]
        if missing or unexpected:
            what = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, of an expert or layer too many"
            raise UserError(
                f"checkpoint {folder}: {what} ({len(missing)} tensors missing, {len(unexpected)} unexpected)"
            )
        position = {name: number for number, name in enumerate(shapes)}
        units = names | {name: [name] for name in self._zeros}
        self.units = dict(sorted(units.items(), key=lambda unit: position[unit[1][0]]))

    def stream(self, units: Iterable[str]) -> Iterator[tuple[str, torch.Tensor | FileTensor]]:
        for unit in units:
            if unit in self._zeros:
                yield unit, self._zeros[unit]
            else:
                yield from to_hf([(unit, self._checkpoint[unit])], self._arch, num_frozen=self._num_frozen)
