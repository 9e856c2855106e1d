"""Virtual upcycling: every rank fills its own parameters straight from the base's safetensors, experts too.

There is no second model and no intermediate checkpoint; what each parameter is made of says origins.py.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch

from megatron_lpr.errors import UserError
from megatron_lpr.families import EMBEDDING, OUTPUT_LAYER, Architecture, family_of
from megatron_lpr.families.mappings import fill
from megatron_lpr.families.names import ParameterName, parse
from megatron_lpr.families.origins import check_experts, check_upcycling, router_rows, source_expert
from megatron_lpr.files.file_tensor import same_bits
from megatron_lpr.files.safetensors_io import SafetensorsReader, torch_dtype

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"

__all__ = ["check_checkpoint", "check_experts", "load_dense", "router_rows"]


def check_checkpoint(reader: SafetensorsReader, arch: Architecture) -> None:
    """UserError unless the checkpoint holds exactly the tensors, shapes and dtype that its config promises."""
    family, dtype = family_of(arch), torch_dtype(arch.dtype)
    reader.check_index()
    shapes = family.shapes(arch, arch.num_experts)
    for name, shape in shapes.items():
        if reader.shape(name) != shape:
            raise UserError(
                f"tensor '{name}' of '{reader.folder}' has shape {reader.shape(name)}, but its config says {shape}"
            )
        if reader.dtype(name) != dtype:
            raise UserError(
                f"tensor '{name}' of '{reader.folder}' is {reader.dtype(name)}, but its config says {dtype}: "
                "correct `dtype` in config.json, or cast the tensor"
            )
    for name in family.zero_shapes(arch, arch.num_experts):
        if reader.get(name).any():
            raise UserError(
                f"tensor '{name}' of '{reader.folder}' is not zero: a model that was trained with it cannot be "
                "converted; an upcycled one can"
            )
    for name in reader.keys():
        # Old versions of transformers save rotary frequencies; a tied head is the embedding again.
        tied_head = arch.tie_word_embeddings and name == HEAD
        if name not in shapes and not name.endswith("rotary_emb.inv_freq") and not tied_head:
            raise UserError(f"'{reader.folder}' holds the tensor '{name}', which has no place in a {arch.family} model")
    if arch.tie_word_embeddings and HEAD in reader:
        _check_tied_head(reader)


def _check_tied_head(reader: SafetensorsReader) -> None:
    """A head of its own would be left out, for the config says that the embedding is the head."""
    head, embeddings = reader.slice(HEAD), reader.slice(EMBEDDINGS)
    if head.dtype != embeddings.dtype or not same_bits(head, embeddings):
        raise UserError(
            f"'{reader.folder}' holds a '{HEAD}' that is not its '{EMBEDDINGS}', although config.json says "
            "tie_word_embeddings = true: set it to false, or remove the tensor"
        )


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
    num_experts, num_frozen: of the model to fill; 0 and 0 for a dense one. A base that has experts already keeps
        them as the first ones.
    Returns the parsed name of every parameter, each filled exactly once, layers numbered globally and new
    experts by their global index among the new ones. Raises UserError when the checkpoint does not hold what
    its config promises or the new experts cannot be divided over the expert-parallel ranks.
    """
    check_upcycling(arch, num_experts=num_experts, num_frozen=num_frozen)
    check_checkpoint(reader, arch)
    num_local = _experts_per_rank(num_experts, num_frozen, ep_size)
    first_new = ep_rank * num_local
    ranks = {"frozen_expert": (0, 1), "new_expert": (etp_rank, etp_size)}
    filled: list[ParameterName] = []
    for local_name, parameter in named_parameters:
        name = _globally(parse(local_name), layer_offset=layer_offset, first_new=first_new)
        if name.role == "router":
            assert parameter.shape == (num_experts, arch.hidden_size), (local_name, parameter.shape)
            router = family_of(arch).router_name(name.layer)
            old = _Finite(reader, router, parameter.dtype)[:] if arch.num_experts else None
            parameter.copy_(
                router_rows(arch, layer=name.layer, num_experts=num_experts, router_std=router_std, seed=seed, old=old)
            )
        else:
            rank, size = ranks.get(name.role, (tp_rank, tp_size))
            _fill_from_base(parameter, name, reader, arch, num_frozen=num_frozen, rank=rank, size=size)
        filled.append(name)
    _check_complete(
        filled, arch, num_experts=num_experts, num_frozen=num_frozen, first_new=first_new, num_local=num_local
    )
    return filled


def _globally(name: ParameterName, *, layer_offset: int, first_new: int) -> ParameterName:
    """The same name with the layer numbered over the whole model and a new expert over all expert ranks."""
    if name.layer is not None:
        name = replace(name, layer=name.layer + layer_offset)
    if name.role == "new_expert":
        name = replace(name, expert=name.expert + first_new)
    return name


def _fill_from_base(
    parameter: torch.Tensor,
    name: ParameterName,
    reader: SafetensorsReader,
    arch: Architecture,
    *,
    num_frozen: int,
    rank: int,
    size: int,
) -> None:
    """Fills one parameter from the base's tensors that it is made of."""
    family, expert = family_of(arch), None
    if name.expert is not None:
        expert = source_expert(arch, name.expert + (num_frozen if name.role == "new_expert" else 0))
    # The last pipeline stage of a model with tied embeddings holds a copy of the embedding as its head.
    tied_head = name.weight == OUTPUT_LAYER and arch.tie_word_embeddings
    mapping = family.find(name.role, EMBEDDING if tied_head else name.weight)
    sources = family.hf_names(mapping, role=name.role, layer=name.layer, expert=expert)
    fill(
        parameter,
        [_Finite(reader, source, parameter.dtype) for source in sources],
        mapping.kind,
        [arch.shape(dims) for dims in mapping.hf.values()],
        groups=arch.num_query_groups,
        rank=rank,
        size=size,
    )


class _Finite:
    """A tensor of the base, still on disk, of which everything that is read must be finite as a parameter of `dtype`.

    What is read anyway is looked at once more in memory; each rank looks at its own slices. UserError otherwise.
    """

    def __init__(self, reader: SafetensorsReader, name: str, dtype: torch.dtype):
        self._where, self._tensor, self._dtype = f"tensor '{name}' of '{reader.folder}'", reader.slice(name), dtype

    def __getitem__(self, index: slice | tuple[slice, slice]) -> torch.Tensor:
        part = self._tensor[index]
        if self._dtype.itemsize < part.dtype.itemsize:
            part = part.to(self._dtype)  # large numbers of a wider dtype become infinite
        if part.numel() and not all(math.isfinite(extreme.item()) for extreme in part.aminmax()):
            raise UserError(
                f"{self._where} holds values that are not finite as {part.dtype} (NaN or infinite): download the model "
                "again, or repair it"
            )
        return part


def _experts_per_rank(num_experts: int, num_frozen: int, ep_size: int) -> int:
    if not num_experts:
        return 0
    if (num_experts - num_frozen) % ep_size:
        raise UserError(
            f"{num_experts - num_frozen} new experts cannot be divided over {ep_size} expert-parallel ranks"
        )
    return (num_experts - num_frozen) // ep_size


def _check_complete(
    filled: list[ParameterName],
    arch: Architecture,
    *,
    num_experts: int,
    num_frozen: int,
    first_new: int,
    num_local: int,
) -> None:
    """Each layer that was met got all of its parameters, each once."""
    assert len(set(filled)) == len(filled), "a parameter was given twice"
    by_layer: dict[int, set[tuple]] = defaultdict(set)
    for name in filled:
        if name.layer is not None:
            by_layer[name.layer].add((name.role, name.weight, name.expert))
    family = family_of(arch)
    ffn = [mapping.megatron for mapping in family.ffn]
    attention = {("layer", mapping.megatron, None) for mapping in family.layer}
    dense = attention | {("dense_ffn", weight, None) for weight in ffn}
    upcycled = attention | {("router", "mlp.router.weight", None)}
    upcycled |= {("frozen_expert", weight, expert) for weight in ffn for expert in range(num_frozen)}
    upcycled |= {("new_expert", weight, first_new + expert) for weight in ffn for expert in range(num_local)}
    for layer, names in by_layer.items():
        expected = upcycled if num_experts and layer not in arch.mlp_only_layers else dense
        assert names == expected, f"layer {layer}: {sorted(map(str, names ^ expected))} missing or unexpected"
