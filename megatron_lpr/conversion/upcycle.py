"""Virtual upcycling: every rank fills its own parameters, experts included, straight from the dense safetensors.

There is no second model and no intermediate checkpoint. A frozen expert and a new expert are both the dense
FFN; only the router is new, and because the gates of a token sum to one its values do not change what the
model computes.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import torch

from megatron_lpr.conversion.families import EMBEDDING, OUTPUT_LAYER, Architecture, Family, family_of
from megatron_lpr.conversion.hf_io import SafetensorsReader
from megatron_lpr.conversion.mappings import Mapping, fill
from megatron_lpr.conversion.names import ParameterName, parse
from megatron_lpr.errors import UserError


def check_experts(*, num_experts: int, num_frozen: int, topk: int = 1) -> None:
    """UserError unless the numbers of experts make sense together."""
    if not 1 <= num_frozen < num_experts:
        raise UserError(
            f"{num_experts} experts with {num_frozen} frozen: there must be at least one frozen and one new expert"
        )
    if not 1 <= topk <= num_experts:
        raise UserError(
            f"top-{topk} routing over {num_experts} experts: top-k must lie between 1 and {num_experts}"
        )


def check_checkpoint(reader: SafetensorsReader, arch: Architecture) -> None:
    """UserError unless the dense checkpoint holds exactly the tensors, shapes and dtypes that its config promises."""
    shapes = family_of(arch).shapes(arch)
    for name, shape in shapes.items():
        if reader.shape(name) != shape:
            raise UserError(
                f"tensor '{name}' of '{reader.folder}' has shape {reader.shape(name)}, its config says {shape}"
            )
        reader.dtype(name)
    for name in reader.keys():
        # Rotary frequencies are saved by old versions of transformers, and a tied head is the embedding again.
        tied_head = arch.tie_word_embeddings and name == "lm_head.weight"
        if name not in shapes and not name.endswith("rotary_emb.inv_freq") and not tied_head:
            raise UserError(
                f"'{reader.folder}' holds the tensor '{name}', which has no place in a {arch.family} model"
            )


def router_rows(
    arch: Architecture, *, layer: int, num_experts: int, router_std: float, seed: int
) -> torch.Tensor:
    """The initial router of a layer, `[E, H]` fp32 from N(0, router_std): the same on every rank of any layout."""
    digest = hashlib.sha256(f"router {seed} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(num_experts, arch.hidden_size, generator=generator) * router_std


@torch.no_grad()
def load_dense(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    reader: SafetensorsReader,
    arch: Architecture,
    *,
    layer_offset: int = 0,
    tp_rank: int = 0,
    tp_size: int = 1,
    ep_rank: int = 0,
    ep_size: int = 1,
    etp_rank: int = 0,
    etp_size: int = 1,
    num_frozen: int = 0,
    num_experts: int = 0,
    router_std: float = 0.0,
    seed: int = 0,
) -> list[ParameterName]:
    """Fills this rank's parameters of one model chunk in place; casts to each parameter's dtype.

    named_parameters: as `GPTModel.named_parameters()` gives them (local or TE spec), layers numbered from 0
    within the
        chunk; global layer = that number + `layer_offset`.
    num_experts, num_frozen: of an upcycled model; 0 and 0 for a dense one.
    Returns the parsed name of every parameter, each filled exactly once, layers numbered globally and new
    experts by their global index among the new ones. Raises UserError when the checkpoint does not hold what
    its config promises or the new experts cannot be divided over the expert-parallel ranks.
    """
    check_checkpoint(reader, arch)
    num_local = _experts_per_rank(num_experts, num_frozen, ep_size)
    family, groups = family_of(arch), arch.num_query_groups
    filled: list[ParameterName] = []
    for name, parameter in named_parameters:
        local = parse(name)
        layer = None if local.layer is None else local.layer + layer_offset
        if local.role == "router":
            assert parameter.shape == (num_experts, arch.hidden_size), (name, parameter.shape)
            rows = router_rows(arch, layer=layer, num_experts=num_experts, router_std=router_std, seed=seed)
            parameter.copy_(rows)
            filled.append(ParameterName(role="router", weight=local.weight, layer=layer))
            continue
        rank, size, expert = tp_rank, tp_size, local.expert
        if local.role == "frozen_expert":
            assert expert < num_frozen, name
            rank, size = 0, 1
        elif local.role == "new_expert":
            assert expert < num_local, name
            rank, size, expert = etp_rank, etp_size, ep_rank * num_local + expert
        mapping, sources = dense_sources(family, arch, local, layer)
        _check_shape(name, parameter, mapping, arch, size)
        slices = [reader.slice(source) for source in sources]
        fill(parameter, slices, mapping.kind, arch.lengths(mapping), groups=groups, rank=rank, size=size)
        filled.append(ParameterName(role=local.role, weight=local.weight, layer=layer, expert=expert))
    _check_complete(filled, family, num_frozen=num_frozen, first_new=ep_rank * num_local, num_local=num_local)
    return filled


def _experts_per_rank(num_experts: int, num_frozen: int, ep_size: int) -> int:
    if not num_experts:
        return 0
    check_experts(num_experts=num_experts, num_frozen=num_frozen)
    if (num_experts - num_frozen) % ep_size:
        raise UserError(
            f"{num_experts - num_frozen} new experts cannot be divided over {ep_size} expert-parallel ranks"
        )
    return (num_experts - num_frozen) // ep_size


def dense_sources(
    family: Family, arch: Architecture, name: ParameterName, layer: int | None
) -> tuple[Mapping, list[str]]:
    """The mapping of a parameter and the dense HF tensors that it is made of; any expert is made of the dense FFN."""
    if name.role == "model":
        tied_head = name.weight == OUTPUT_LAYER and arch.tie_word_embeddings
        mapping = find_mapping(family.model, EMBEDDING if tied_head else name.weight)
        return mapping, list(mapping.hf)
    if name.role == "layer":
        mapping = find_mapping(family.layer, name.weight)
        return mapping, [f"model.layers.{layer}.{source}" for source in mapping.hf]
    mapping = find_mapping(family.ffn, name.weight)
    return mapping, [family.ffn_name(layer, source, expert=None) for source in mapping.hf]


def find_mapping(table: tuple[Mapping, ...], megatron: str) -> Mapping:
    found = next((mapping for mapping in table if mapping.megatron == megatron), None)
    assert found is not None, f"no family table knows the parameter '{megatron}'"
    return found


def _check_shape(name: str, parameter: torch.Tensor, mapping: Mapping, arch: Architecture, size: int) -> None:
    """Every axis but the partitioned one must be whole; `fill` checks the partitioned one."""
    shape = list(arch.shape(next(iter(mapping.hf.values()))))
    shape[mapping.kind.axis] = parameter.shape[mapping.kind.axis]
    assert list(parameter.shape) == shape, f"'{name}' has shape {tuple(parameter.shape)} on {size} ranks"


def _check_complete(
    filled: list[ParameterName], family: Family, *, num_frozen: int, first_new: int, num_local: int
) -> None:
    """Each layer that was met got all of its parameters, each once."""
    assert len(set(filled)) == len(filled), "a parameter was given twice"
    by_layer: dict[int, set[tuple]] = defaultdict(set)
    for name in filled:
        if name.layer is not None:
            by_layer[name.layer].add((name.role, name.weight, name.expert))
    ffn = [mapping.megatron for mapping in family.ffn]
    attention = {("layer", mapping.megatron, None) for mapping in family.layer}
    dense = attention | {("dense_ffn", weight, None) for weight in ffn}
    upcycled = attention | {("router", "mlp.router.weight", None)}
    upcycled |= {("frozen_expert", weight, expert) for weight in ffn for expert in range(num_frozen)}
    upcycled |= {("new_expert", weight, first_new + expert) for weight in ffn for expert in range(num_local)}
    for layer, names in by_layer.items():
        expected = upcycled if any(role == "router" for role, _, _ in names) else dense
        assert names == expected, f"layer {layer}: {sorted(map(str, names ^ expected))} missing or unexpected"
