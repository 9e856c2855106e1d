"""Where the tensors of an export come from: a checkpoint, or a base model that is upcycled on the way.

A source is a list of units, each of which gives some HF tensors: those of one parameter of a checkpoint. Tensors that
lie in a file in one piece are not read here: the writer copies them from file to file.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_lpr.checkpoint.base_files import check_base_files, run_folder_of
from megatron_lpr.checkpoint.dist_checkpoint import DistCheckpoint, StoredParameter
from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.checkpoint.same_run import check_config_and_tokenizer
from megatron_lpr.checkpoint.source import chain
from megatron_lpr.conversion.record import Made
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, family_of, read_architecture
from megatron_lpr.families.expansion import (
    Expansion,
    initial_tensor,
    origins,
    with_layers_kept_dense,
    with_shared_expert,
    zero_tensors,
)
from megatron_lpr.families.mappings import Mapping, parse, positions, take_apart
from megatron_lpr.families.weights import open_weights
from megatron_lpr.files.file_tensor import FileTensor, Narrowable, Shape
from megatron_lpr.files.safetensors_io import torch_dtype
from megatron_lpr.model.load.upcycle import check_checkpoint

HFTensors = Iterator[tuple[str, torch.Tensor | FileTensor]]


class Source(Protocol):
    """units: name of each -> the HF tensors that it gives, in the order in which they are best read."""

    units: dict[str, list[str]]

    def stream(self, units: Iterable[str]) -> HFTensors: ...


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A checkpoint as HF tensors: what export writes, and what verification compares an export with.

    arch: of the export. hf_dir: whose config, tokenizer and frozen tensors it has.
    """

    arch: Architecture
    hf_dir: Path
    source: Source


def trained_model(
    folder: Path, made: Made, *, base_dir: str | Path, shared_expert_size: int | None = None, load: str | None = None
) -> TrainedModel:
    """The model in the checkpoint `folder`, what that leaves to other checkpoints and to the base included.

    load: where the checkpoint that the run started from may be now. UserError when one is missing, or they and the base
    that training started from do not fit.
    """
    arch = with_layers_kept_dense(read_architecture(base_dir), made.expansion.mlp_only_layers)
    check_config_and_tokenizer(base_dir, arch, folder)
    arch = with_shared_expert(arch, shared_expert_size)
    checkpoints = chain(folder, load)
    lowest, base = read_run_state(checkpoints[-1]), None
    if lowest.content == "over base":
        check_base_files(base_dir, lowest.base, checkpoints[-1], run_folder_of(checkpoints[-1]))
        dtype = torch_dtype(read_run_state(folder).recipe["model"]["dtype"])
        base = FrozenTensors(base_dir, arch, made, dtype)
    source = CheckpointSource(folder, arch, made.expansion, under=checkpoints[1:], base=base)
    return TrainedModel(arch=arch, hf_dir=Path(base_dir), source=source)


class UpcycledSource:
    """A HF model upcycled as it is read; a unit is a tensor of the result. UserError: see `check_checkpoint`."""

    def __init__(self, base_dir: str | Path, arch: Architecture, expansion: Expansion):
        self._reader, self._arch, self._expansion = open_weights(base_dir, arch), arch, expansion
        check_checkpoint(self._reader, arch)
        self._origins = origins(arch, expansion.num_experts)
        self.units = {name: [name] for name in self._origins}

    def stream(self, units: Iterable[str]) -> HFTensors:
        for name in units:
            yield name, initial_tensor(name, self._origins[name], self._reader, self._arch, self._expansion)


class FrozenTensors:
    """The tensors of a model that training left as they are in the base, by their names in the export.

    dtype: of training, which rounded them where it cannot hold them.
    """

    def __init__(self, base_dir: str | Path, arch: Architecture, made: Made, dtype: torch.dtype):
        self._reader, self._dtype = open_weights(base_dir, arch), dtype
        check_checkpoint(self._reader, arch)
        self._copied = {
            name: origin.copied
            for name, origin in origins(arch, made.expansion.num_experts).items()
            if origin.is_frozen(made.expansion.num_frozen)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._copied

    def __getitem__(self, name: str) -> torch.Tensor | FileTensor:
        tensor = self._reader.slice(self._copied[name])
        is_exact = torch.promote_types(tensor.dtype, self._dtype) == self._dtype
        return tensor if is_exact else tensor[:].to(self._dtype)


class CheckpointSource:
    """A Megatron distributed checkpoint of any layout; a unit is one of its parameters, or a tensor of the base.

    arch: of the base model. under: checkpoints that hold what this one does not, the nearest first. base: what none of
    them holds. UserError when they do not hold exactly what a model of this architecture is made of after this
    expansion.
    """

    def __init__(
        self,
        folder: str | Path,
        arch: Architecture,
        expansion: Expansion,
        *,
        under: Sequence[Path] = (),
        base: FrozenTensors | None = None,
    ):
        checkpoints = [DistCheckpoint(path) for path in (folder, *under)]
        self._holder = {name: checkpoint for checkpoint in reversed(checkpoints) for name in checkpoint}
        self._arch, self._num_frozen, self._base = arch, expansion.num_frozen, base
        names = {name: hf_names(name, arch, num_frozen=self._num_frozen) for name in self._holder}
        for name, tensors in names.items():
            parameter = self._holder[name][name]
            if not tensors or not _has_its_shape(parameter, name, arch, expansion.num_experts):
                raise UserError(
                    f"checkpoint {folder}: its parameter '{name}' {list(parameter.shape)} has no place in a "
                    f"{arch.family} model like the base: was it trained from another one?"
                )
        self._zeros = dict(zero_tensors(arch, expansion.num_experts))
        shapes = family_of(arch).shapes(arch, expansion.num_experts)
        given = {tensor for tensors in names.values() for tensor in tensors} | self._zeros.keys()
        self._of_base = {name for name in shapes if base is not None and name in base} - given
        given |= self._of_base
        missing = [name for name in shapes if name not in given]
        unexpected = [name for name in given if name not in shapes]
        if missing or unexpected:
            what = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, of an expert or layer too many"
            raise UserError(
                f"checkpoint {folder}: {what} ({len(missing)} tensors missing, {len(unexpected)} unexpected)"
            )
        position = {name: number for number, name in enumerate(shapes)}
        units = names | {name: [name] for name in (*self._zeros, *self._of_base)}
        self.units = dict(sorted(units.items(), key=lambda unit: position[unit[1][0]]))

    def stream(self, units: Iterable[str]) -> HFTensors:
        for unit in units:
            if unit in self._zeros:
                yield unit, self._zeros[unit]
            elif unit in self._of_base and self._base is not None:
                yield unit, self._base[unit]
            else:
                yield from to_hf([(unit, self._holder[unit][unit])], self._arch, num_frozen=self._num_frozen)


def to_hf(parameters: Iterable[tuple[str, Narrowable]], arch: Architecture, *, num_frozen: int) -> HFTensors:
    """Whole Megatron parameters, in memory or on disk, renamed and unpacked, one at a time.

    Layers and new experts are numbered over the whole model.
    """
    family = family_of(arch)
    for megatron_name, parameter in parameters:
        names, mapping = hf_names(megatron_name, arch, num_frozen=num_frozen), family.mapping(parse(megatron_name))
        assert names, f"the {family.name} table has no parameter '{megatron_name}'"
        if isinstance(parameter, torch.Tensor):
            parameter = parameter.detach()
        if mapping is None:  # a router
            yield names[0], parameter.narrow(0, 0, parameter.shape[0])
            continue
        shapes = [arch.shape(dims) for dims in mapping.hf.values()]
        stored = _on_disk(parameter, mapping, shapes, arch) if isinstance(parameter, StoredParameter) else None
        yield from zip(
            names, stored or take_apart(parameter, mapping.kind, shapes, groups=arch.num_query_groups), strict=True
        )


def _on_disk(
    parameter: StoredParameter, mapping: Mapping, shapes: list[Shape], arch: Architecture
) -> list[FileTensor] | None:
    """The HF tensors of a parameter where they lie; None unless each of them lies in a file in one piece."""
    kind, found = mapping.kind, []
    for pieces in positions(kind, shapes, rows=parameter.shape[kind.axis], groups=arch.num_query_groups):
        tensor = parameter.on_disk(kind.axis, *pieces[0]) if len(pieces) == 1 else None
        if tensor is None:
            return None
        found.append(tensor)
    return found


def hf_names(megatron_name: str, arch: Architecture, *, num_frozen: int) -> list[str]:
    """The HF tensors that a parameter is made of; none for a parameter that the family does not have."""
    name = parse(megatron_name)
    expert = name.expert
    if expert is not None and name.role == "frozen_expert" and expert >= num_frozen:
        return []
    if expert is not None and name.role == "new_expert":
        expert += num_frozen
    return family_of(arch).hf_names(name, expert)


def _has_its_shape(parameter: Narrowable, megatron_name: str, arch: Architecture, num_experts: int) -> bool:
    """Whether a parameter is as large as its HF tensors are together."""
    mapping, found = family_of(arch).mapping(parse(megatron_name)), tuple(parameter.shape)
    if mapping is None:  # a router
        return found == (num_experts, arch.hidden_size)
    shapes, axis = [arch.shape(dims) for dims in mapping.hf.values()], mapping.kind.axis
    rows = sum(shape[axis] for shape in shapes)
    expected = (*shapes[0][:axis], rows, *shapes[0][axis + 1 :])
    if len(found) == len(expected) and mapping.kind.padded and found[axis] >= rows:
        return found[:axis] + found[axis + 1 :] == expected[:axis] + expected[axis + 1 :]
    return found == expected
