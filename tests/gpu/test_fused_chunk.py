"""On a GPU: the loss of a chunk in two passes is the loss of the same chunk in PyTorch's operations."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
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
    torch.testing.assert_close(fused.losses_C, plain.losses_C, rtol=1e-5, atol=1e-5)
    got, expected = fused.gradient_CV(factors), plain.gradient_CV(factors)
    assert got.dtype == expected.dtype == dtype and not got[:, true:].any()
    assert (got - expected).norm() <= tolerance * expected.norm()


def test_a_logit_that_is_not_finite_makes_its_loss_so(megatron):
    from megatron_lpr.model.fused_chunk import FusedChunk
    from megatron_lpr.model.output_layer import VocabularyShard

    x, weight = torch.ones(3, HIDDEN, device="cuda"), torch.ones(COLUMNS, HIDDEN, device="cuda")
    x[1, 5] = torch.nan
    shard = VocabularyShard(first=0, true=COLUMNS, group=SimpleNamespace(size=lambda: 1))
    losses = FusedChunk(x, weight, torch.zeros(3, dtype=torch.int64, device="cuda"), shard).losses_C
    assert losses.isfinite().tolist() == [True, False, True]
