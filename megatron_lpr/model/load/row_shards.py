"""Sharded parameters filled from a checkpoint: each rank reads the rows that it has, and nothing else."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_lpr.checkpoint.dist_checkpoint import DistCheckpoint, StoredParameter
from megatron_lpr.checkpoint.holding import holds
from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, family_of
from megatron_lpr.families.mappings import QKV, Copy, GateUp, ParameterName, fill, parse
from megatron_lpr.families.table import EMBEDDING, OUTPUT_LAYER
from megatron_lpr.files.file_tensor import Shape
from megatron_lpr.model.builder import named_weights
from megatron_lpr.platform.place import RankPlace
from megatron_lpr.platform.shards import is_sharded, own_part, own_rows


@torch.no_grad()
def fill_row_shards(folder: Path, chunks: list[torch.nn.Module], arch: Architecture) -> None:
    """Fill what the checkpoint holds of this rank's sharded parameters; `load_checkpoint` passes them over.

    Raises:
        UserError: the checkpoint is damaged or holds another model.
    """
    content, place = read_run_state(folder).content, RankPlace.of_this_rank()
    parameters = {parse(name): (name, parameter) for name, parameter in named_weights(chunks)}
    sharded = {name: p for name, (full, p) in parameters.items() if is_sharded(p) and holds(content, full)}
    if not sharded:
        return
    checkpoint = DistCheckpoint(folder)
    stored = {parse(name): name for name in checkpoint}
    each = 1 + max((name.expert or 0 for name in sharded if name.role == "new_expert"), default=0)
    for name, parameter in sharded.items():
        if name.role == "new_expert" and name.expert is not None:
            name = replace(name, expert=name.expert + place.ep_rank * each)
        if name.weight == OUTPUT_LAYER and arch.tie_word_embeddings:
            name = replace(name, weight=EMBEDDING)  # of which the last pipeline stage holds a copy
        if name not in stored:
            raise UserError(f"checkpoint {folder}: cannot be loaded into this model: it has no {_described(name)}")
        _fill(parameter, name, checkpoint[stored[name]], arch, place)


def _fill(
    parameter: torch.Tensor, name: ParameterName, stored: StoredParameter, arch: Architecture, place: RankPlace
) -> None:
    mapping = family_of(arch).mapping(name)
    assert mapping is not None, name
    rank, size = place.cut(name.role)
    shapes = [arch.shape(dims) for dims in mapping.hf.values()]
    total, kind = sum(shape[mapping.kind.axis] for shape in shapes), mapping.kind
    expected = list(shapes[0])
    expected[kind.axis] = total
    # rows that pad the vocabulary are as many as the layout that wrote the checkpoint asked for
    fits = list(stored.shape[1:]) == expected[1:] and (
        stored.shape[0] >= expected[0] if kind.padded else stored.shape[0] == expected[0]
    )
    if not fits:
        raise UserError(
            f"checkpoint {stored.checkpoint.folder}: cannot be loaded into this model: its {_described(name)} has the "
            f"shape {tuple(stored.shape)} where the model has {tuple(expected)}"
        )
    if isinstance(kind, GateUp):
        sources = [_Rows(stored, 0, total // 2), _Rows(stored, total // 2, total // 2)]
    else:
        sources = [_Rows(stored, 0, expected[0])]
        if isinstance(kind, QKV):
            kind, shapes = Copy(split=0), [tuple(expected)]
    rows = own_rows(parameter)
    fill(
        own_part(parameter),
        sources,
        kind,
        shapes,
        groups=arch.num_query_groups,
        rank=rank,
        size=size,
        rows=parameter.shape[0],
        first=rows.start,
    )


def _described(name: ParameterName) -> str:
    layer = "" if name.layer is None else f" of layer {name.layer}"
    expert = "" if name.expert is None else f", {name.role.replace('_', ' ')} {name.expert}"
    return f"'{name.weight}'{layer}{expert}"


@dataclass(frozen=True)
class _Rows:
    """Some rows of a stored parameter; `[a:b]` and `[a:b, c:d]` read that part of them."""

    stored: StoredParameter
    first: int
    number: int

    @property
    def shape(self) -> Shape:
        return (self.number, *self.stored.shape[1:])

    def __getitem__(self, index: slice | tuple[slice, slice]) -> torch.Tensor:
        spans = [(self.first, self.first + self.number), *((0, size) for size in self.stored.shape[1:])]
        for axis, part in enumerate(index if isinstance(index, tuple) else (index,)):
            start, stop, _ = part.indices(self.shape[axis])
            spans[axis] = (spans[axis][0] + start, spans[axis][0] + stop)
        return self.stored.read(spans)
