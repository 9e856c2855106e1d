"""Virtual upcycling: every rank fills its own parameters straight from the dense safetensors, experts too.

There is no second model and no intermediate checkpoint. A frozen expert and a new expert are both the dense
FFN; only the router is new, and because the gates of a token sum to one its values do not change what the
model computes.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch

from megatron_lpr.conversion.families import EMBEDDING, OUTPUT_LAYER, Architecture, Family, family_of
from megatron_lpr.conversion.hf_io import SafetensorsReader
from megatron_lpr.conversion.mappings import fill
from megatron_lpr.conversion.names import ParameterName, parse
from megatron_lpr.errors import UserError


def check_experts(*, num_experts: int, num_frozen: int, topk: int = 1) -> None:
    """UserError unless the numbers of experts make sense together."""
    if not 1 <= num_frozen < num_experts:
        raise UserError(f"{num_experts} experts with {num_frozen} frozen: at least one must be frozen and one new")
    if not 1 <= topk <= num_experts:
        raise UserError(f"top-{topk} routing over {num_experts} experts: top-k must lie between 1 and {num_experts}")


def check_checkpoint(reader: SafetensorsReader, arch: Architecture) -> None:
    """UserError unless the dense checkpoint holds exactly the tensors and shapes that its config promises."""
    shapes = family_of(arch).shapes(arch)
    for name, shape in shapes.items():
        if reader.shape(name) != shape:
            raise UserError(
                f"tensor '{name}' of '{reader.folder}' has shape {reader.shape(name)}, but its config says {shape}"
            )
        reader.dtype(name)
    for name in reader.keys():
        # Old versions of transformers save rotary frequencies; a tied head is the embedding again.
        tied_head = arch.tie_word_embeddings and name == "lm_head.weight"
        if name not in shapes and not name.endswith("rotary_emb.inv_freq") and not tied_head:
            raise UserError(f"'{reader.folder}' holds the tensor '{name}', which has no place in a {arch.family} model")


def router_rows(arch: Architecture, *, layer: int, num_experts: int, router_std: float, seed: int) -> torch.Tensor:
    """The initial router of a layer, `[E, H]` fp32 from N(0, router_std), the same in every layout."""
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
        within the chunk; the global layer is that number + `layer_offset`.
    num_experts, num_frozen: of an upcycled model; 0 and 0 for a dense one.
    Returns the parsed name of every parameter, each filled exactly once, layers numbered globally and new
    experts by their global index among the new ones. Raises UserError when the checkpoint does not hold what
    its config promises or the new experts cannot be divided over the expert-parallel ranks.
    """
    check_checkpoint(reader, arch)
    num_local = _experts_per_rank(num_experts, num_frozen, ep_size)
    first_new = ep_rank * num_local
    ranks = {"frozen_expert": (0, 1), "new_expert": (etp_rank, etp_size)}
    filled: list[ParameterName] = []
    for local_name, parameter in named_parameters:
        name = _globally(parse(local_name), layer_offset=layer_offset, first_new=first_new)
        if name.role == "router":
            assert parameter.shape == (num_experts, arch.hidden_size), (local_name, parameter.shape)
            rows = router_rows(arch, layer=name.layer, num_experts=num_experts, router_std=router_std, seed=seed)
            parameter.copy_(rows)
        else:
            rank, size = ranks.get(name.role, (tp_rank, tp_size))
            _fill_from_dense(parameter, name, reader, arch, rank=rank, size=size)
        filled.append(name)
    _check_complete(filled, family_of(arch), num_frozen=num_frozen, first_new=first_new, num_local=num_local)
    return filled


def _globally(name: ParameterName, *, layer_offset: int, first_new: int) -> ParameterName:
    """The same name with the layer numbered over the whole model and a new expert over all expert ranks."""
    if name.layer is not None:
        name = replace(name, layer=name.layer + layer_offset)
    if name.role == "new_expert":
        name = replace(name, expert=name.expert + first_new)
    return name


def _fill_from_dense(
    parameter: torch.Tensor,
    name: ParameterName,
    reader: SafetensorsReader,
    arch: Architecture,
    *,
    rank: int,
    size: int,
) -> None:
    """Fills one parameter from the dense tensors that it is made of; any expert's are the dense FFN's."""
    family = family_of(arch)
    # The last pipeline stage of a model with tied embeddings holds a copy of the embedding as its head.
    tied_head = name.weight == OUTPUT_LAYER and arch.tie_word_embeddings
    mapping = family.find(name.role, EMBEDDING if tied_head else name.weight)
    slices = [reader.slice(source) for source in family.hf_names(mapping, role=name.role, layer=name.layer)]
    fill(
        parameter,
        slices,
        mapping.kind,
        [arch.shape(dims) for dims in mapping.hf.values()],
        groups=arch.num_query_groups,
        rank=rank,
        size=size,
    )


def _experts_per_rank(num_experts: int, num_frozen: int, ep_size: int) -> int:
    if not num_experts:
        return 0
    check_experts(num_experts=num_experts, num_frozen=num_frozen)
    if (num_experts - num_frozen) % ep_size:
        raise UserError(
            f"{num_experts - num_frozen} new experts cannot be divided over {ep_size} expert-parallel ranks"
        )
    return (num_experts - num_frozen) // ep_size


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
