"""The rule of upcycling: what each tensor of the upcycled model is made of."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_lpr.conversion.families import Architecture, family_of
from megatron_lpr.conversion.hf_io import SafetensorsReader
from megatron_lpr.conversion.upcycle import check_experts, router_rows


class Origin(NamedTuple):
    """Where a tensor of an upcycled HF model comes from.

    base: the base's tensor that a `copy` equals. layer: of a router. expert: the expert that the tensor belongs to.
    """

    kind: Literal["copy", "router", "zeros"]
    base: str | None = None
    layer: int | None = None
    expert: int | None = None


def check_upcycling(arch: Architecture, *, num_experts: int, num_frozen: int, topk: int = 1) -> None:
    """UserError unless a model of so many experts can be made of the base; 0 experts keep it dense."""
    if num_experts:
        check_experts(num_experts=num_experts, num_frozen=num_frozen, topk=topk)


def origins(arch: Architecture, num_experts: int) -> dict[str, Origin]:
    """Every tensor of the model with `num_experts` experts (0: dense), in file order."""
    family = family_of(arch)
    found = {name: Origin("copy", name) for name in family.shapes(arch, num_experts)}
    for layer in range(arch.num_layers if num_experts else 0):
        found[family.router_name(layer)] = Origin("router", layer=layer)
        for weight in (source for mapping in family.ffn for source in mapping.hf):
            for expert in range(num_experts):
                dense = family.ffn_name(layer, weight, None)
                found[family.ffn_name(layer, weight, expert)] = Origin("copy", dense, expert=expert)
    return found


def initial_tensor(
    name: str,
    origin: Origin,
    reader: SafetensorsReader,
    arch: Architecture,
    *,
    num_experts: int,
    router_std: float,
    seed: int,
) -> Tensor:
    """The value of one tensor of the upcycled model before any training."""
    if origin.kind == "zeros":
        return torch.zeros(family_of(arch).shapes(arch, num_experts)[name])
    if origin.kind == "copy":
        return reader.get(origin.base)
    return router_rows(arch, layer=origin.layer, num_experts=num_experts, router_std=router_std, seed=seed)
