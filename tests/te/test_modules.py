"""Transformer Engine's modules against plain PyTorch, in fp32 and bf16."""

import pytest
import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from transformer_engine.pytorch.optimizers import FusedAdam

T, H, N = 64, 128, 256  # tokens, inputs, outputs
SPLITS = [10, 0, 30, 24]
MODULES = {
    "linear": lambda options: te.Linear(H, N, params_dtype=options["dtype"], device="cpu"),
    "rmsnorm": lambda options: te.RMSNorm(H, **options),
    "layernorm": lambda options: te.LayerNorm(H, **options),
    "layernorm_linear": lambda options: te.LayerNormLinear(
        H, N, bias=False, normalization="RMSNorm", params_dtype=options["dtype"], device="cpu"
    ),
    "grouped_linear": lambda options: te.GroupedLinear(
        4, H, N, bias=False, params_dtype=options["dtype"], device="cpu"
    ),
}
REFERENCES = {
    "linear": lambda x, w: F.linear(x, w["weight"], w["bias"]),
    "rmsnorm": lambda x, w: F.rms_norm(x, (H,), w["weight"], 1e-5),
    "layernorm": lambda x, w: F.layer_norm(x, (H,), w["weight"], w["bias"], 1e-5),
    "layernorm_linear": lambda x, w: F.linear(F.rms_norm(x, (H,), w["layer_norm_weight"], 1e-5), w["weight"]),
    "grouped_linear": lambda x, w: torch.cat(
        [F.linear(part, w[f"weight{i}"]) for i, part in enumerate(x.split(SPLITS))]
    ),
}


def assert_close(got, expected, tolerance: float, what: str) -> None:
    got, expected = got.detach().float(), expected.detach().float()
    assert (got - expected).norm() <= tolerance * expected.norm(), what


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_computes_what_pytorch_does(name, dtype, tolerance):
    module = MODULES[name]({"dtype": dtype, "device": "cpu"})
    weights = {key: weight.detach().clone().requires_grad_() for key, weight in module.named_parameters()}
    mine = torch.randn(T, H, dtype=dtype, requires_grad=True)
    other = mine.detach().clone().requires_grad_()
    got = module(mine, SPLITS) if name == "grouped_linear" else module(mine)
    expected = REFERENCES[name](other, weights)
    assert got.dtype == dtype
    gradient = torch.randn_like(got)
    got.backward(gradient)
    expected.backward(gradient)
    assert_close(got, expected, tolerance, "output")
    assert_close(mine.grad, other.grad, tolerance, "input")
    for key, weight in module.named_parameters():
        assert_close(weight.grad, weights[key].grad, tolerance, key)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_unfused_attention(dtype, tolerance):
    S, B, HEADS, GROUPS, D = 24, 2, 4, 2, 16
    attend = te.DotProductAttention(
        HEADS, D, num_gqa_groups=GROUPS, attention_dropout=0.0, attn_mask_type="causal", qkv_format="sbhd"
    )
    qkv = [torch.randn(S, B, heads, D, dtype=dtype, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
    got = attend(*qkv)
    got.sum().backward()
    mine = [tensor.grad for tensor in qkv]
    for tensor in qkv:
        tensor.grad = None
    heads_first = [tensor.permute(1, 2, 0, 3) for tensor in qkv]
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    expected = expected.permute(2, 0, 1, 3).reshape(S, B, -1)
    expected.sum().backward()
    assert_close(got, expected, tolerance, "output")
    for gradient, tensor in zip(mine, qkv, strict=True):
        assert_close(gradient, tensor.grad, tolerance, "input")


def test_adam():
    options = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine = torch.nn.Parameter(torch.randn(50))
    other = torch.nn.Parameter(mine.detach().clone())
    optimizers = FusedAdam([mine], **options), torch.optim.AdamW([other], **options)
    for _ in range(5):
        gradient = torch.randn(50)
        for parameter, optimizer in zip((mine, other), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert_close(mine, other, 1e-6, "parameter")
