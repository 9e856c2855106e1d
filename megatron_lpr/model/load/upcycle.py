"""Virtual upcycling: every rank fills its own parameters straight from the base's safetensors, experts too.

There is no second model and no intermediate checkpoint; what each parameter is made of says expansion.py.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, family_of
from megatron_lpr.families.expansion import Expansion, check_upcycling, router_rows, source_expert
from megatron_lpr.families.mappings import ParameterName, fill, parse
from megatron_lpr.families.table import EMBEDDING, OUTPUT_LAYER
from megatron_lpr.files.file_tensor import same_bits
from megatron_lpr.files.safetensors_io import SafetensorsReader, torch_dtype
from megatron_lpr.platform.place import RankPlace
from megatron_lpr.platform.shards import own_part, own_rows

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
DENSE, ONLY_RANK, ALL = Expansion(), RankPlace(), (0, 1)
_InLayer = tuple[str, str, int | None]  # role, weight, expert
_Filled = dict[tuple[tuple[str, ...], int, int, range, torch.dtype], torch.Tensor]  # by what each is made of
Share = tuple[int, int]  # of what several ranks do once together: number of a rank, number of ranks


def check_checkpoint(reader: SafetensorsReader, arch: Architecture, share: Share = ALL) -> None:
    """UserError unless the checkpoint holds exactly the tensors, shapes and dtype that its config promises.

    share: of the values that must be looked at; names and shapes are looked at in any case.
    """
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
    for name in itertools.islice(family.zero_shapes(arch, arch.num_experts), share[0], None, share[1]):
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
        _check_tied_head(reader, share)


def _check_tied_head(reader: SafetensorsReader, share: Share) -> None:
    """A head of its own would be left out, for the config says that the embedding is the head."""
    head, embeddings = reader.slice(HEAD), reader.slice(EMBEDDINGS)
    if head.dtype != embeddings.dtype or not same_bits(head, embeddings, share):
        raise UserError(
            f"'{reader.folder}' holds a '{HEAD}' that is not its '{EMBEDDINGS}', although config.json says "
            "tie_word_embeddings = true: set it to false, or remove the tensor"
        )


@torch.no_grad()
def load_dense(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    reader: SafetensorsReader,
    arch: Architecture,
    expansion: Expansion = DENSE,
    *,
    place: RankPlace = ONLY_RANK,
    layer_offset: int = 0,
    wanted: Callable[[str], bool] = lambda name: True,
    share: Share = ALL,
) -> list[ParameterName]:
    """Fills this rank's parameters of one model chunk in place; casts to each parameter's dtype.

    named_parameters: as `GPTModel.named_parameters()` gives them (local or TE spec), layers numbered from 0
        within the chunk; the global layer is that number + `layer_offset`.
    expansion: of the base to the model to fill. A base that has experts already keeps them as the first ones.
    wanted: by the parameter's local name; of the others nothing is read.
    share: as of `check_checkpoint`.
    Returns the parsed name of every parameter that was met, each once, the wanted ones filled; layers numbered
    globally and new experts by their global index among the new ones. Raises UserError when the checkpoint does not
    hold what its config promises or the new experts cannot be divided over the expert-parallel ranks.
    """
    check_upcycling(arch, expansion)
    check_checkpoint(reader, arch, share)
    own = _own_experts(expansion, place)
    met: list[ParameterName] = []
    filled: _Filled = {}
    for local_name, parameter in named_parameters:
        name = _globally(parse(local_name), layer_offset=layer_offset, first_new=own.start)
        if not wanted(local_name):
            pass
        elif name.role == "router":
            _fill_router(parameter, name, reader, arch, expansion)
        else:
            _fill_from_base(parameter, name, reader, arch, expansion, place, filled)
        met.append(name)
    _check_complete(met, arch, expansion, own)
    return met


def _globally(name: ParameterName, *, layer_offset: int, first_new: int) -> ParameterName:
    """The same name with the layer numbered over the whole model and a new expert over all expert ranks."""
    if name.layer is not None:
        name = replace(name, layer=name.layer + layer_offset)
    if name.role == "new_expert":
        assert name.expert is not None
        name = replace(name, expert=name.expert + first_new)
    return name


def _fill_router(
    parameter: torch.Tensor, name: ParameterName, reader: SafetensorsReader, arch: Architecture, expansion: Expansion
) -> None:
    assert name.layer is not None and parameter.shape == (expansion.num_experts, arch.hidden_size), (name, parameter)
    router = family_of(arch).router_name(name.layer)
    old = _Finite(reader, router, parameter.dtype)[:] if arch.num_experts else None
    parameter.copy_(router_rows(arch, expansion, layer=name.layer, old=old))


def _fill_from_base(
    parameter: torch.Tensor,
    name: ParameterName,
    reader: SafetensorsReader,
    arch: Architecture,
    expansion: Expansion,
    place: RankPlace,
    filled: _Filled,
) -> None:
    """Fills one parameter from the base's tensors that it is made of, or from one that is made of the same.

    filled: the parameters up to this one, which is added.
    """
    family, expert = family_of(arch), None
    if name.expert is not None:
        expert = source_expert(arch, name.expert + (expansion.num_frozen if name.role == "new_expert" else 0))
    # The last pipeline stage of a model with tied embeddings holds a copy of the embedding as its head.
    tied_head = name.weight == OUTPUT_LAYER and arch.tie_word_embeddings
    made_of = replace(name, weight=EMBEDDING) if tied_head else name
    mapping = family.mapping(made_of)
    assert mapping is not None, f"the {family.name} table has no {name.role} parameter '{name.weight}'"
    rank, size = place.cut(name.role)
    part, rows, sources = own_part(parameter), own_rows(parameter), tuple(family.hf_names(made_of, expert))
    alike = filled.setdefault((sources, rank, size, rows, parameter.dtype), part)
    if alike is not part:  # experts begin as copies
        part.copy_(alike)
        return
    fill(
        part,
        [_Finite(reader, source, parameter.dtype) for source in sources],
        mapping.kind,
        [arch.shape(dims) for dims in mapping.hf.values()],
        groups=arch.num_query_groups,
        rank=rank,
        size=size,
        rows=parameter.shape[0],
        first=rows.start,
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


def _own_experts(expansion: Expansion, place: RankPlace) -> range:
    """The new experts of this rank, numbered over all new experts."""
    new = expansion.num_experts - expansion.num_frozen
    if new % place.ep_size:
        raise UserError(f"{new} new experts cannot be divided over {place.ep_size} expert-parallel ranks")
    each = new // place.ep_size
    return range(place.ep_rank * each, (place.ep_rank + 1) * each)


def _check_complete(filled: list[ParameterName], arch: Architecture, expansion: Expansion, own: range) -> None:
    """Each layer that was met got all of its parameters, each once. own: this rank's new experts."""
    assert len(set(filled)) == len(filled), "a parameter was given twice"
    by_layer: dict[int, set[_InLayer]] = defaultdict(set)
    for name in filled:
        if name.layer is not None:
            by_layer[name.layer].add((name.role, name.weight, name.expert))
    family = family_of(arch)
    ffn = [mapping.megatron for mapping in family.ffn]
    attention: set[_InLayer] = {("layer", mapping.megatron, None) for mapping in family.layer}
    dense = attention | {("dense_ffn", weight, None) for weight in ffn}
    upcycled = attention | {("router", "mlp.router.weight", None)}
    upcycled |= {("frozen_expert", weight, expert) for weight in ffn for expert in range(expansion.num_frozen)}
    upcycled |= {("new_expert", weight, expert) for weight in ffn for expert in own}
    for layer, names in by_layer.items():
        expected = upcycled if expansion.num_experts and layer not in arch.mlp_only_layers else dense
        assert names == expected, f"layer {layer}: {sorted(map(str, names ^ expected))} missing or unexpected"
