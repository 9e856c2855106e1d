"""Transformer Engine's modules in FP8, against operands rounded by hand and multiplied in fp32."""

import pytest
import te_on_cpu
import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.common import recipe

T, H, N = 128, 128, 256  # tokens, inputs, outputs
E4M3, E5M2 = (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)
RECIPES = {
    "current_hybrid": recipe.Float8CurrentScaling(),
    "current_e4m3": recipe.Float8CurrentScaling(fp8_format=recipe.Format.E4M3),
    "delayed": recipe.DelayedScaling(amax_history_len=4),
    "blocks": recipe.Float8BlockScaling(),
}


def rounded(x: Tensor, fp8, scale: Tensor | None = None) -> Tensor:
    """The values of a tensor after a cast to FP8 with one scale (of the largest magnitude where none is given)."""
    dtype, limit = fp8
    if scale is None:
        scale = torch.div(limit, x.float().abs().max())  # `limit / x` is reciprocal and product: one bit off
    return (x.float() * scale).clamp(-limit, limit).to(dtype).float() / scale


def rounded_rows(x: Tensor) -> Tensor:
    """The same with a power-of-two scale for every 128 values of a row."""
    blocks = x.float().view(x.shape[0], -1, 128)
    scale = 2.0 ** torch.floor(torch.log2(E4M3[1] / blocks.abs().amax(-1, keepdim=True)))
    return rounded(blocks, E4M3, scale).view(x.shape)


def rounded_squares(x: Tensor) -> Tensor:
    """The same for every 128 x 128 values."""
    blocks = x.float().view(x.shape[0] // 128, 128, -1, 128)
    scale = 2.0 ** torch.floor(torch.log2(E4M3[1] / blocks.abs().amax((1, 3), keepdim=True)))
    return rounded(blocks, E4M3, scale).view(x.shape)


def by_hand(x: Tensor, w: Tensor, g: Tensor, what) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, gradient of the weight."""
    if what.float8_block_scaling():
        columns = rounded_rows(g.T.contiguous()), rounded_rows(x.T.contiguous()).T
        return rounded_rows(x) @ rounded_squares(w).T, rounded_rows(g) @ rounded_squares(w), columns[0] @ columns[1]
    of_gradient = E5M2 if what.fp8_format == recipe.Format.HYBRID else E4M3
    xq, wq, gq = rounded(x, E4M3), rounded(w, E4M3), rounded(g, of_gradient)
    return xq @ wq.T, gq @ wq, gq.T @ xq


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().float() - expected).norm() / expected.norm())


def linear(*, frozen: bool = False) -> te.Linear:
    made = te.Linear(H, N, bias=False, params_dtype=torch.bfloat16, device="cpu")
    made.weight.requires_grad_(not frozen)
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_linear(name):
    what, module = RECIPES[name], linear()
    x, g = (torch.randn(T, H) * 3).bfloat16().requires_grad_(), torch.randn(T, N).bfloat16()
    for _ in range(3):  # delayed scaling needs a history
        x.grad = module.weight.grad = None
        with te.autocast(enabled=True, recipe=what):
            y = module(x)
        y.backward(g)
    w = module.weight.detach()
    found = (y, x.grad, module.weight.grad)
    exact = (x.float() @ w.float().T, g.float() @ w.float(), g.float().T @ x.float())
    for got, expected, unrounded in zip(found, by_hand(x.detach(), w, g, what), exact, strict=True):
        assert distance(got, expected) < 3e-3  # rounding to bf16
        assert 5e-3 < distance(got, unrounded) < 8e-2  # rounding to FP8


def test_layernorm_linear():
    module = te.LayerNormLinear(H, N, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16, device="cpu")
    x = torch.randn(T, H).bfloat16().requires_grad_()
    with te.autocast(enabled=True, recipe=recipe.Float8CurrentScaling()):
        y = module(x)
    normed = F.rms_norm(x.float(), (H,), module.layer_norm_weight.float(), 1e-5).bfloat16()
    assert distance(y, (rounded(normed, E4M3) @ rounded(module.weight.detach(), E4M3).T).detach()) < 3e-3


def test_groups_of_tokens_are_padded_to_16():
    """Without padding the weight gradient fails: cuBLAS refuses it too."""
    module = te.GroupedLinear(4, H, N, bias=False, params_dtype=torch.bfloat16, device="cpu")
    x, splits = torch.randn(64, H).bfloat16().requires_grad_(), [10, 0, 30, 24]
    with te.autocast(enabled=True, recipe=recipe.Float8CurrentScaling()):
        unpadded = module(x, splits)
    with pytest.raises(RuntimeError, match="Caller must pad"):
        unpadded.sum().backward()
    padded, padded_splits = te.Fp8Padding(4)(x, splits)
    with te.autocast(enabled=True, recipe=recipe.Float8CurrentScaling()):
        y = te.Fp8Unpadding(4)(module(padded, padded_splits), splits)
    y.sum().backward()
    parts = zip(x.detach().split(splits), module.parameters(), strict=True)
    expected = torch.cat([rounded(part, E4M3) @ rounded(w.detach(), E4M3).T for part, w in parts if len(part)])
    assert padded_splits == [16, 0, 32, 32]
    assert distance(y, expected) < 3e-3


@pytest.mark.parametrize("flags, casts", [([None] * 4, 4), ([True, False, False, False], 1)])
def test_a_weight_is_cast_in_the_first_micro_batch(flags, casts):
    module = linear(frozen=True)
    for flag in flags:
        with te.autocast(enabled=True, recipe=recipe.Float8CurrentScaling()):
            module(torch.randn(T, H).bfloat16(), is_first_microbatch=flag)
    assert te_on_cpu.called()["quantize"] == casts + len(flags)


def test_what_is_not_emulated_says_so():
    import transformer_engine_torch

    with pytest.raises(NotImplementedError, match="fused_attn_fwd"):
        transformer_engine_torch.fused_attn_fwd()
    assert te_on_cpu.missing() == {"fused_attn_fwd": 1}
