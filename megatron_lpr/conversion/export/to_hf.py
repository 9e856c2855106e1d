"""Whole Megatron parameters to Hugging Face tensors, one parameter at a time; they may still be on disk."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from megatron_lpr.checkpoint.dist_checkpoint import StoredParameter
from megatron_lpr.families import Architecture, Family, family_of
from megatron_lpr.families.mappings import Mapping, positions, take_apart
from megatron_lpr.families.names import ParameterName, parse
from megatron_lpr.files.file_tensor import FileTensor, Narrowable, Shape

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def to_hf(
    parameters: Iterable[tuple[str, Narrowable]], arch: Architecture, *, num_frozen: int
) -> Iterator[tuple[str, torch.Tensor | FileTensor]]:
    """Renames and unpacks parameters; layers and new experts are numbered over the whole model."""
    family = family_of(arch)
    for megatron_name, parameter in parameters:
        names = hf_names(megatron_name, arch, num_frozen=num_frozen)
        assert names, f"the {family.name} table has no parameter '{megatron_name}'"
        if isinstance(parameter, torch.Tensor):
            parameter = parameter.detach()
        if parse(megatron_name).role == "router":
            yield names[0], parameter.narrow(0, 0, parameter.shape[0])
            continue
        mapping = _mapping(family, parse(megatron_name))
        shapes = [arch.shape(dims) for dims in mapping.hf.values()]
        stored = _on_disk(parameter, mapping, shapes, arch) if isinstance(parameter, StoredParameter) else None
        parts = stored or take_apart(parameter, mapping.kind, shapes, groups=arch.num_query_groups)
        yield from zip(names, parts, strict=True)


def _on_disk(
    parameter: StoredParameter, mapping: Mapping, shapes: list[Shape], arch: Architecture
) -> list[FileTensor] | None:
    """The HF tensors of a parameter where they lie; None unless each of them lies in a file in one piece."""
    kind, rows = mapping.kind, parameter.shape[mapping.kind.axis]
    parts = positions(kind, shapes, rows=rows, groups=arch.num_query_groups)
    found = [parameter.on_disk(kind.axis, *pieces[0]) if len(pieces) == 1 else None for pieces in parts]
    return None if None in found else found


def hf_names(megatron_name: str, arch: Architecture, *, num_frozen: int) -> list[str]:
    """The HF tensors that a parameter is made of; none for a parameter that the family does not have."""
    family, name = family_of(arch), parse(megatron_name)
    if name.role == "router":
        return [family.router_name(name.layer)]
    if name.role == "frozen_expert" and name.expert >= num_frozen:
        return []
    if name.role == "new_expert":
        name = replace(name, expert=name.expert + num_frozen)
    mapping = _mapping(family, name)
    return family.hf_names(mapping, role=name.role, layer=name.layer, expert=name.expert) if mapping else []


def has_shape_of(parameter: Narrowable, megatron_name: str, arch: Architecture, *, num_experts: int) -> bool:
    """Whether a parameter, of which `hf_names` knows the HF tensors, is as large as they are together."""
    name, found = parse(megatron_name), tuple(parameter.shape)
    if name.role == "router":
        return found == (num_experts, arch.hidden_size)
    mapping = _mapping(family_of(arch), name)
    shapes, axis = [arch.shape(dims) for dims in mapping.hf.values()], mapping.kind.axis
    rows = sum(shape[axis] for shape in shapes)
    expected = (*shapes[0][:axis], rows, *shapes[0][axis + 1 :])
    if len(found) == len(expected) and mapping.kind.padded and found[axis] >= rows:
        return found[:axis] + found[axis + 1 :] == expected[:axis] + expected[axis + 1 :]
    return found == expected


def _mapping(family: Family, name: ParameterName) -> Mapping | None:
    table = {"model": family.model, "layer": family.layer}.get(name.role, family.ffn)
    return next((mapping for mapping in table if mapping.megatron == name.weight), None)
