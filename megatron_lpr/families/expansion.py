"""The rule of upcycling: what each tensor of the upcycled model is made of.

Expert i of the new model is expert i of the base where the base has one (a dense base: its FFN, for every i), and a
copy of expert 0, the original FFN, where it has not. Everything else is the base's, and the router keeps its rows.

What a new row does. A dense base computes the same after upcycling whatever the router says, for all experts are
equal and a token's gates sum to one. A base with experts does not: a new expert that is chosen takes a place among the
top k. No row r can be certain never to be chosen: for k >= 2 that asks for r.h <= max over j != i of w_j.h, for every h
and every i, so r would lie in the convex hull of all rows but any one, and these hulls have no common point when the
rows are affinely independent. So a new row is a copy of row 0 with a little noise, beside an expert that is a copy of
expert 0. Without the noise, a token changes only if expert 0 was chosen before the last of its top k; then copies of
expert 0 take the places after it, and its output moves to what the original FFN gives. For every other token the
function is the same: where expert 0 is not chosen its copies are not, and where it is the last one chosen it does not
matter which copy is.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, family_of
from megatron_lpr.families.hf_config import MOST_EXPERTS
from megatron_lpr.files.file_tensor import FileTensor
from megatron_lpr.files.safetensors_io import SafetensorsReader


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """What the FFNs of a base become; without experts the model stays dense, and the other numbers say nothing.

    num_experts: of each layer that has experts, the frozen ones included. num_frozen: experts 0..n-1, never trained.
    topk: experts that each token goes to. mlp_only_layers: layers (from 0) without experts.
    router_std, router_seed: of the initial router, see `router_rows`.
    """

    num_experts: int = 0
    num_frozen: int = 1
    topk: int = 2
    mlp_only_layers: tuple[int, ...] = ()
    router_std: float = 0.02
    router_seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_only_layers", tuple(sorted(set(self.mlp_only_layers))))
        if not self.num_experts:
            object.__setattr__(self, "num_frozen", 0)
            object.__setattr__(self, "topk", 0)

    def check(self) -> None:
        """UserError unless the numbers of experts make sense together."""
        if not self.num_experts:
            return
        if not 1 <= self.num_frozen < self.num_experts:
            raise UserError(
                f"{self.num_experts} experts with {self.num_frozen} frozen: at least one must be frozen and one new"
            )
        if not 1 <= self.topk <= self.num_experts:
            raise UserError(
                f"top-{self.topk} routing over {self.num_experts} experts: top-k must lie between 1 and "
                f"{self.num_experts}"
            )


class Origin(NamedTuple):
    """Where a tensor of an upcycled HF model comes from.

    base: the base's tensor that a `copy` equals, or that holds the old rows of a `router` (None: it is all new).
    layer: of a router. expert: the expert that the tensor belongs to.
    """

    kind: Literal["copy", "router", "zeros"]
    base: str | None = None
    layer: int | None = None
    expert: int | None = None

    @property
    def copied(self) -> str:
        """The base's tensor that it is a copy of."""
        assert self.kind == "copy" and self.base is not None, self
        return self.base

    def is_frozen(self, num_frozen: int) -> bool:
        """Whether training leaves the tensor as it is: everything but the routers and the new experts."""
        return self.kind == "copy" and num_frozen > 0 and (self.expert is None or self.expert < num_frozen)


def check_upcycling(arch: Architecture, expansion: Expansion) -> None:
    """UserError unless a model can be made of the base by this expansion; 0 experts keep a dense base dense."""
    old, num_experts = arch.num_experts, expansion.num_experts
    if num_experts < old:
        raise UserError(
            f"the base model has {old} experts already, so num_experts cannot be {num_experts}: "
            f"{old} loads it as it is, more expand it again"
        )
    expansion.check()
    if num_experts * arch.num_layers > MOST_EXPERTS:
        raise UserError(
            f"{num_experts} experts in {arch.num_layers} layers: a model can have {MOST_EXPERTS} in all layers together"
        )
    if old and expansion.topk != arch.topk:
        raise UserError(
            f"the base model routes to its top {arch.topk} experts; top-{expansion.topk} would be another function"
        )
    if old and num_experts > old and expansion.num_frozen < old:
        raise UserError(
            f"all {old} experts of the base model are frozen when it is expanded again: "
            f"set num_frozen_experts (--num-frozen) to {old}, not {expansion.num_frozen}"
        )


def source_expert(arch: Architecture, expert: int) -> int | None:
    """The base's expert that `expert` of the upcycled model is a copy of; None means the dense FFN."""
    if not arch.num_experts:
        return None
    return expert if expert < arch.num_experts else 0


def origins(arch: Architecture, num_experts: int) -> dict[str, Origin]:
    """Every tensor of the model with `num_experts` experts (0: dense) that is made of the base, in file order."""
    family = family_of(arch)
    found = {name: Origin("copy", name) for name in family.shapes(arch, num_experts)}
    found |= dict.fromkeys(family.zero_shapes(arch, num_experts), Origin("zeros"))
    for layer in arch.moe_layers() if num_experts else ():
        router = family.router_name(layer)
        found[router] = Origin("router", router if arch.num_experts else None, layer=layer)
        for weight in (source for mapping in family.ffn for source in mapping.hf):
            for expert in range(num_experts):
                base = family.ffn_name(layer, weight, source_expert(arch, expert))
                found[family.ffn_name(layer, weight, expert)] = Origin("copy", base, expert=expert)
    return found


def initial_tensor(
    name: str, origin: Origin, reader: SafetensorsReader, arch: Architecture, expansion: Expansion
) -> Tensor | FileTensor:
    """One tensor of the upcycled model before any training; a copy still lies in the base's file."""
    if origin.kind == "copy":
        return reader.slice(origin.copied)
    if origin.kind == "zeros":
        return torch.zeros(family_of(arch).zero_shapes(arch, expansion.num_experts)[name])
    old = reader.get(origin.base) if origin.base else None
    assert origin.layer is not None, origin
    return router_rows(arch, expansion, layer=origin.layer, old=old)


def router_rows(arch: Architecture, expansion: Expansion, *, layer: int, old: Tensor | None = None) -> Tensor:
    """The initial router of a layer, `[E, H]` fp32, the same in every layout.

    Rows are drawn from N(0, router_std); those beside the rows of an `old` router are that much noise on its row 0.
    """
    digest = hashlib.sha256(f"router {expansion.router_seed} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rows = torch.randn(expansion.num_experts, arch.hidden_size, generator=generator) * expansion.router_std
    if old is None:
        return rows
    return torch.cat([old.float(), old[0].float() + rows[len(old) :]])


def zero_tensors(arch: Architecture, num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """What the MoE class has on disk and Megatron's model has not."""
    for name, shape in family_of(arch).zero_shapes(arch, num_experts).items():
        yield name, torch.zeros(shape)


def with_layers_kept_dense(arch: Architecture, layers: Sequence[int]) -> Architecture:
    """The same model, of which these layers (from 0) get no experts when it is upcycled; none: as it is.

    UserError where the MoE class has no such layers, or the base has its experts in others already.
    """
    if not layers:
        return arch
    kept, family = tuple(sorted(set(layers))), family_of(arch)
    if "mlp_only_layers" not in family.moe.fields:
        raise UserError(
            f"mlp_only_layers {list(kept)}: a {family.moe.architecture} has experts in every layer; "
            "only models that are exported to a Qwen class can keep dense layers"
        )
    if kept[0] < 0 or kept[-1] >= arch.num_layers or len(kept) == arch.num_layers:
        raise UserError(f"mlp_only_layers {list(kept)}: some, not all, of the layers 0 to {arch.num_layers - 1}")
    if arch.num_experts and kept != arch.mlp_only_layers:
        raise UserError(
            f"mlp_only_layers {list(kept)}: the base model has experts already, in all layers but "
            f"{list(arch.mlp_only_layers)}"
        )
    return replace(arch, mlp_only_layers=kept)


def with_shared_expert(arch: Architecture, size: int | None) -> Architecture:
    """The same model, which gets a zero shared expert of this width when it is exported; None: as it is.

    UserError where the MoE class has none, or the base has one already.
    """
    if size is None:
        return arch
    family = family_of(arch)
    if "shared_expert_size" not in family.moe.fields:
        raise UserError(f"shared_expert_size {size}: a {family.moe.architecture} has no shared expert; leave it out")
    if size < 0:
        raise UserError(f"shared_expert_size {size}: at least 0, which leaves the shared expert's weights out")
    if arch.num_experts and size != arch.shared_expert_size:
        raise UserError(f"shared_expert_size {size}: the base model has one of width {arch.shared_expert_size} already")
    return replace(arch, shared_expert_size=size)
