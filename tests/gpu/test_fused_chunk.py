"""On a GPU: the loss of a chunk in two passes is the loss of the same chunk in PyTorch's operations."""

from types import SimpleNamespace

import pytest
import torch
from gpu_marks import ON_GPU

pytestmark = ON_GPU
TOKENS, HIDDEN, COLUMNS = 77, 64, 10_000


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("first, true", [(0, 9_001), (5_000, 10_000), (0, 20_000)])
def test_the_same_loss_and_gradient(megatron, dtype, tolerance, first, true):
    """Of a rank that holds all columns, padding among them; of a later one, for which most labels are elsewhere."""
    from megatron_lpr.model.fused_chunk import FusedChunk
    from megatron_lpr.model.output_layer import Chunk, VocabularyShard

    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, HIDDEN), torch.randn(COLUMNS, HIDDEN) * 0.3
    labels = torch.randint(min(true, COLUMNS), (TOKENS,)).cuda()
    factors = torch.rand(TOKENS).cuda()
    shard = VocabularyShard(first=first, true=true, group=SimpleNamespace(size=lambda: 1))
    arguments = (x.to("cuda", dtype), weight.to("cuda", dtype), labels, shard)
    fused, plain = FusedChunk(*arguments), Chunk(*arguments)
    here = (labels >= first) & (labels < first + COLUMNS)  # the others' losses lack what another rank knows
    assert here.any()
    torch.testing.assert_close(fused.losses_C[here], plain.losses_C[here], rtol=1e-5, atol=1e-5)
    got, expected = fused.gradient_CV(factors), plain.gradient_CV(factors)
    assert got.dtype == expected.dtype == dtype and not got[:, true:].any()
    assert (got - expected).norm() <= tolerance * expected.norm()


def test_ranks_that_share_the_vocabulary(megatron, monkeypatch):
    """What a rank adds to the sums of the others, with the sums done by hand; the last columns are padding."""
    from megatron_lpr.model import fused_chunk
    from megatron_lpr.model.output_layer import Chunk, VocabularyShard

    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, HIDDEN, device="cuda"), torch.randn(COLUMNS, HIDDEN, device="cuda") * 0.3
    labels, ones = torch.randint(7_000, (TOKENS,), device="cuda"), torch.ones(TOKENS, device="cuda")
    alone, two = (SimpleNamespace(size=lambda size=size: size) for size in (1, 2))
    half = COLUMNS // 2
    pieces = [(weight[:half], 0, 7_000), (weight[half:], half, 2_000)]

    def of_rank(rank, group):
        part, first, true = pieces[rank]
        return fused_chunk.FusedChunk(
            x, part.contiguous(), labels, VocabularyShard(first=first, true=true, group=group)
        )

    apart = [of_rank(rank, alone) for rank in range(2)]
    largest = torch.maximum(apart[0]._largest_C, apart[1]._largest_C)
    of_label = [chunk._sum_C.log() + chunk._largest_C - chunk.losses_C for chunk in apart]
    sums = [
        torch.stack([label, chunk._sum_C * (chunk._largest_C - largest).exp()])
        for label, chunk in zip(of_label, apart, strict=True)
    ]
    whole = Chunk(x, weight, labels, VocabularyShard(first=0, true=7_000, group=alone))
    expected = whole.gradient_CV(ones).split(half, dim=1)
    for rank in range(2):
        totals = [largest, sums[0] + sums[1]]
        monkeypatch.setattr(fused_chunk.dist, "all_reduce", lambda tensor, op, group, t=totals: tensor.copy_(t.pop(0)))
        chunk = of_rank(rank, two)
        torch.testing.assert_close(chunk.losses_C, whole.losses_C, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunk.gradient_CV(ones), expected[rank], rtol=1e-4, atol=1e-7)


def test_a_logit_that_is_not_finite_makes_its_loss_so(megatron):
    from megatron_lpr.model.fused_chunk import FusedChunk
    from megatron_lpr.model.output_layer import VocabularyShard

    x, weight = torch.ones(3, HIDDEN, device="cuda"), torch.ones(COLUMNS, HIDDEN, device="cuda")
    x[1, 5] = torch.nan
    shard = VocabularyShard(first=0, true=COLUMNS, group=SimpleNamespace(size=lambda: 1))
    losses = FusedChunk(x, weight, torch.zeros(3, dtype=torch.int64, device="cuda"), shard).losses_C
    assert losses.isfinite().tolist() == [True, False, True]
