"""Layouts against packings written out by hand."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lpr.families.mappings import QKV, Copy, GateUp, fill, take_apart

HEAD_DIM, HIDDEN = 4, 6


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def filled(shape, sources, kind, groups=1, **rank):
    target = torch.full(shape, torch.nan)
    fill(target, sources, kind, [tuple(source.shape) for source in sources], groups=groups, **rank)
    return target


@pytest.mark.parametrize("heads,groups,size", [(4, 2, 1), (4, 2, 2), (4, 4, 2), (4, 2, 4), (6, 3, 3), (4, 1, 2)])
@pytest.mark.parametrize("tail", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_qkv_is_interleaved_per_group_and_cut_by_rows(heads, groups, size, tail):
    q, k, v = (randn(n * HEAD_DIM, *tail) + i for i, n in enumerate((heads, groups, groups)))
    packed = torch.cat(
        [part[g * len(part) // groups : (g + 1) * len(part) // groups] for g in range(groups) for part in (q, k, v)]
    )
    slices = packed.chunk(size)
    for rank in range(size):
        got = filled(slices[rank].shape, [q, k, v], QKV(), groups, rank=rank, size=size)
        assert torch.equal(got, slices[rank])
    shapes = [tuple(part.shape) for part in (q, k, v)]
    for got, expected in zip(take_apart(packed, QKV(), shapes, groups=groups), (q, k, v), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_holds_its_gate_over_its_up(size):
    gate, up = randn(8, HIDDEN), randn(8, HIDDEN) + 1
    for rank in range(size):
        expected = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        assert torch.equal(filled(expected.shape, [gate, up], GateUp(), rank=rank, size=size), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_copy_is_partitioned_along_its_axis(axis):
    whole = randn(8, 12)
    for rank, expected in enumerate(whole.chunk(4, dim=axis)):
        assert torch.equal(filled(expected.shape, [whole], Copy(split=axis), rank=rank, size=4), expected)


@pytest.mark.parametrize("kind", [QKV(), GateUp(), Copy(split=0, padded=True), Copy(split=1), Copy()], ids=str)
@pytest.mark.parametrize("number", [3, 4, 7])
def test_some_rows_of_a_slice(kind, number):
    sources = {QKV: [randn(16, 6), randn(8, 6), randn(8, 6)], GateUp: [randn(16, 6), randn(16, 6)]}
    parts, size = sources.get(type(kind), [randn(30, 6)]), 1 if kind == Copy() else 2
    shape = {QKV: (16, 6), GateUp: (16, 6)}.get(
        type(kind), (16, 6) if kind.padded else (30, 3) if size > 1 else (30, 6)
    )
    for rank in range(size):
        whole = filled(shape, parts, kind, 2, rank=rank, size=size)
        for first in range(0, shape[0], number):
            expected = whole[first : first + number]
            got = filled(expected.shape, parts, kind, 2, rank=rank, size=size, rows=shape[0], first=first)
            assert torch.equal(got, expected), (rank, first)


def test_copy_without_split_is_whole_on_every_rank():
    assert torch.equal(filled((5,), [randn(5)], Copy(), rank=1, size=2), randn(5))


def test_vocabulary_is_padded_with_zero_rows_and_cut_back():
    whole = randn(10, HIDDEN)
    slices = [filled((8, HIDDEN), [whole], Copy(split=0, padded=True), rank=rank, size=3) for rank in range(3)]
    padded = torch.cat(slices)
    assert torch.equal(padded, torch.cat([whole, torch.zeros(14, HIDDEN)]))
    assert torch.equal(take_apart(padded, Copy(split=0, padded=True), [(10, HIDDEN)], groups=1)[0], whole)


@pytest.mark.parametrize("shape", [(3, HIDDEN), (5, HIDDEN), (4, HIDDEN + 1)])
def test_a_parameter_of_another_size_is_refused(shape):
    with pytest.raises(AssertionError):
        filled(shape, [randn(8, HIDDEN)], Copy(split=0), rank=0, size=2)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups=st.sampled_from([1, 2, 4]), per_group=st.integers(1, 3), size=st.sampled_from([1, 2, 4]))
def test_slices_of_all_ranks_together_are_the_whole(groups, per_group, size):
    parts = [randn(groups * n * HEAD_DIM, HIDDEN) + n for n in (per_group, 1, 1)]
    rows = sum(len(part) for part in parts)
    whole = filled((rows, HIDDEN), parts, QKV(), groups)
    if rows % size == 0:
        slices = [filled((rows // size, HIDDEN), parts, QKV(), groups, rank=r, size=size) for r in range(size)]
        assert torch.equal(torch.cat(slices), whole)
