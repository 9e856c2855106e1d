"""A Megatron parameter: what its name says, and how it is made of Hugging Face tensors and taken apart again.

Pure functions: no model, no process group. A parameter is a sequence of *segments* along one axis, each a range of rows
(or columns) of one HF tensor. The segments of a rank's slice say what to read on import; those of the whole parameter,
read backwards, say what to write on export. So each kind of mapping is written once and is its own inverse.

Sizes in the names of dimensions:
V vocabulary, H hidden, F FFN width, Q heads * head_dim, K query groups * head_dim, D head_dim, E experts,
S width of a shared expert, 1 one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from megatron_lpr.files.file_tensor import Narrowable, Shape

# Transformer Engine fuses norms into the linear that follows, and keeps a group of experts in one module.
_TE_TO_LOCAL = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.local_experts.\2.\1.weight"),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.(frozen_experts|experts\.local_experts)\.(\d+)\.(.+)")
_DENSE = re.compile(r"mlp\.(linear_fc[12]\..+)")
Role = Literal["model", "layer", "router", "dense_ffn", "frozen_expert", "new_expert"]
_ROLE: dict[str, Role] = {"frozen_experts": "frozen_expert", "experts.local_experts": "new_expert"}


@dataclass(frozen=True, kw_only=True)
class ParameterName:
    """A parsed Megatron parameter name.

    weight: the name relative to the model, the layer or the FFN, as in the family tables.
    layer: the layer number in the name, None outside the decoder layers.
    expert: the expert number in the name (among the frozen, or among the new experts), None outside experts.
    """

    role: Role
    weight: str
    layer: int | None = None
    expert: int | None = None


def parse(name: str) -> ParameterName:
    """Parses the name of a parameter of a local-spec or TE-spec GPTModel."""
    in_layer = _LAYER.fullmatch(name)
    if in_layer is None:
        return ParameterName(role="model", weight=name)
    layer, rest = int(in_layer[1]), in_layer[2]
    for pattern, replacement in _TE_TO_LOCAL:
        rest = re.sub("^" + pattern, replacement, rest)
    if rest == "mlp.router.weight":
        return ParameterName(role="router", weight=rest, layer=layer)
    if expert := _EXPERT.fullmatch(rest):
        return ParameterName(role=_ROLE[expert[1]], weight=expert[3], layer=layer, expert=int(expert[2]))
    if dense := _DENSE.fullmatch(rest):
        return ParameterName(role="dense_ffn", weight=dense[1], layer=layer)
    return ParameterName(role="layer", weight=rest, layer=layer)


class Segment(NamedTuple):
    """Rows (or columns) `start` to `stop` of HF tensor number `source` of a mapping."""

    source: int
    start: int
    stop: int


class Sliceable(Protocol):
    """A tensor, or a tensor still on disk: `t[a:b]` and `t[:, a:b]` read just that part."""

    def __getitem__(self, index: slice | tuple[slice, slice]) -> torch.Tensor: ...


def window(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """The part of a sequence of segments between its rows `start` and `stop`."""
    cut, row = [], 0
    for source, first, last in segments:
        low, high = max(start, row), min(stop, row + last - first)
        if low < high:
            cut.append(Segment(source, first + low - row, first + high - row))
        row += last - first
    return cut


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One HF tensor as it is: whole on every rank or partitioned along `split`; `padded` with zero rows."""

    split: int | None = None
    padded: bool = False

    @property
    def axis(self) -> int:
        return self.split or 0

    def segments(self, lengths: Sequence[int], *, groups: int, rows: int, rank: int, size: int) -> list[Segment]:
        (length,) = lengths
        return window([Segment(0, 0, length)], rank * rows, (rank + 1) * rows)


@dataclass(frozen=True)
class QKV:
    """q, k and v projections, per query group `[q heads of the group | k | v]`, partitioned by rows.

    With at least as many groups as ranks a rank holds whole groups, otherwise a range of rows within one.
    """

    split = 0
    axis = 0
    padded = False

    def segments(self, lengths: Sequence[int], *, groups: int, rows: int, rank: int, size: int) -> list[Segment]:
        per_group = [length // groups for length in lengths]
        interleaved = [
            Segment(source, group * n, (group + 1) * n) for group in range(groups) for source, n in enumerate(per_group)
        ]
        return window(interleaved, rank * rows, (rank + 1) * rows)


@dataclass(frozen=True)
class GateUp:
    """The two input projections of SwiGLU: each rank holds `[its rows of gate | its rows of up]`."""

    split = 0
    axis = 0
    padded = False

    def segments(self, lengths: Sequence[int], *, groups: int, rows: int, rank: int, size: int) -> list[Segment]:
        half = rows // 2
        return [Segment(source, rank * half, (rank + 1) * half) for source in (0, 1)]


Kind = Copy | QKV | GateUp


@dataclass(frozen=True)
class Mapping:
    """A Megatron parameter and the HF tensors it is made of (`hf`: name -> dimensions, a letter each)."""

    megatron: str
    kind: Kind
    hf: dict[str, str]


def fill(
    target: torch.Tensor,
    sources: Sequence[Sliceable],
    kind: Kind,
    shapes: Sequence[Shape],
    *,
    groups: int,
    rank: int = 0,
    size: int = 1,
    rows: int | None = None,
    first: int = 0,
) -> None:
    """Writes rank `rank` of `size`'s slice of a parameter into `target`, in place, casting to its dtype.

    shapes: of the whole sources, of which nothing but what is written is read.
    rows, first: where `target` is only a part of the slice, the rows of the slice, and the first of them in `target`.
    """
    if kind.split is None:
        rank, size = 0, 1
    axis = kind.axis
    lengths = [shape[axis] for shape in shapes]
    rows, stop, total = rows or target.shape[0], first + target.shape[0], sum(lengths)
    whole = [rows, *target.shape[1:]]  # the slice
    length = whole.pop(axis)
    assert whole == [*shapes[0][:axis], *shapes[0][axis + 1 :]], (whole, shapes)
    assert length * size >= total if kind.padded else length * size == total, (
        f"{size} slices of {length} rows do not make up {total}"
    )
    segments = kind.segments(lengths, groups=groups, rows=length, rank=rank, size=size)
    if axis == 0:
        segments = window(segments, first, stop)
    filled = 0
    for source, start, end in segments:
        part = sources[source][start:end] if axis == 0 else sources[source][first:stop, start:end]
        target.narrow(axis, filled, end - start).copy_(part)
        filled += end - start
    assert kind.padded or filled == target.shape[axis]
    target.narrow(axis, filled, target.shape[axis] - filled).zero_()


def positions(kind: Kind, shapes: Sequence[Shape], *, rows: int, groups: int) -> list[list[tuple[int, int]]]:
    """Of each HF tensor: (first row, number of rows) of its parts in the whole parameter, which has `rows` rows.

    Rows are counted along the mapping's axis; those that only pad the parameter belong to no tensor.
    """
    lengths = [shape[kind.axis] for shape in shapes]
    assert rows >= sum(lengths) if kind.padded else rows == sum(lengths), (
        f"a parameter of {rows} rows is not made of {lengths}"
    )
    found: list[list[tuple[int, int]]] = [[] for _ in lengths]
    row = 0
    for source, start, stop in kind.segments(lengths, groups=groups, rows=rows, rank=0, size=1):
        found[source].append((row, stop - start))
        row += stop - start
    return found


def take_apart(tensor: Narrowable, kind: Kind, shapes: Sequence[Shape], *, groups: int) -> list[torch.Tensor]:
    """The HF tensors a whole (unpartitioned) Megatron parameter is made of; padding is cut off."""
    axis = kind.axis
    tensors = []
    for parts in positions(kind, shapes, rows=tensor.shape[axis], groups=groups):
        pieces = [tensor.narrow(axis, row, length) for row, length in parts]
        tensors.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis))
    return tensors
