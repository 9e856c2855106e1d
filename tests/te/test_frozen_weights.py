"""Frozen weights under Transformer Engine: no product for their gradient, no input kept for one, no cast for either."""

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from layouts import trainer_of
from transformer_engine.common import recipe

from megatron_lpr.testing.toy_models import write_toy_model

T, H, N, SPLITS = 48, 64, 96, [16, 0, 32]  # tokens, inputs, outputs: no two kinds of tensors have as many elements
EXPERTS = 4
CONTEXTS = {"bf16": None, "tensorwise": recipe.Float8CurrentScaling(), "blockwise": recipe.Float8BlockScaling()}
OPTIONS = dict(bias=False, params_dtype=torch.bfloat16, device="cpu")
MODULES = {
    "linear": lambda: te.Linear(H, N, **OPTIONS),
    "layernorm_linear": lambda: te.LayerNormLinear(H, N, normalization="RMSNorm", **OPTIONS),
    "grouped_linear": lambda: te.GroupedLinear(len(SPLITS), H, N, **OPTIONS),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base", hidden_size=64, intermediate_size=96)


@dataclass
class Seen:
    """What a forward and backward pass did.

    Attributes:
        products: how many of each kind: `forward`, `input` and `weight` gradients; a grouped one counts once.
        saved: elements of each tensor that autograd keeps.
        columns: elements of gradients of outputs that were cast by columns too.
    """

    products: Counter = field(default_factory=Counter)
    saved: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)


@contextlib.contextmanager
def watched(monkeypatch):
    seen = Seen()

    def told(name, function):
        def call(A, transA, B, transB, *args, **kwargs):
            kind = {(True, False): "forward", (False, False): "input", (False, True): "weight"}[transA, transB]
            # Megatron-Core 0.19 has routers multiply here too: no other tensor has as many columns as there are experts
            of_router = name == "linear" and EXPERTS in (A.size()[-1], B.size()[-1])
            seen.products[f"{'router' if of_router else name} {kind}"] += 1
            return function(A, transA, B, transB, *args, **kwargs)

        return call

    split = tex.split_quantize

    def split_quantize(tensor, splits, quantizers, **options):
        if not torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:  # in a backward pass
            parts = zip(tensor.split(splits), quantizers, strict=True)
            seen.columns += [part.numel() for part, quantizer in parts if quantizer.columnwise_usage]
        return split(tensor, splits, quantizers, **options)

    def keep(tensor):
        seen.saved.append(tensor.numel())
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(tex, "generic_gemm", told("linear", tex.generic_gemm))
        patch.setattr(tex, "te_general_grouped_gemm", told("grouped", tex.te_general_grouped_gemm))
        patch.setattr(tex, "split_quantize", split_quantize)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield seen


@pytest.mark.parametrize("numbers", CONTEXTS)
@pytest.mark.parametrize("name", MODULES)
def test_a_module(monkeypatch, name, numbers):
    seen, kind = {}, name.partition("_")[0] if name.startswith("grouped") else "linear"
    for learns in (True, False):
        module = MODULES[name]()
        module.requires_grad_(learns)
        x = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
        context = CONTEXTS[numbers]
        with watched(monkeypatch) as seen[learns]:
            with te.autocast(enabled=context is not None, recipe=context):
                y = module(x, SPLITS) if kind == "grouped" else module(x)
            y.backward(torch.ones_like(y))
        assert x.grad is not None
    assert seen[True].products == {f"{kind} forward": 1, f"{kind} input": 1, f"{kind} weight": 1}
    assert seen[False].products == {f"{kind} forward": 1, f"{kind} input": 1}
    parts = {part * H for part in SPLITS if part} if kind == "grouped" else {T * H}
    inputs = {learns: sum(size in parts for size in it.saved) for learns, it in seen.items()}
    of_norm = name == "layernorm_linear"  # whose own gradient needs its input
    assert inputs[True] == len(parts) + of_norm and inputs[False] == of_norm


@pytest.mark.parametrize("numbers", ["none", "tensorwise", "blockwise"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_step(megatron, monkeypatch, base, tmp_path, stage, numbers):
    changes = {"model": {"spec": "te", "dtype": "bfloat16", "num_experts": EXPERTS}, "fp8": {"recipe": numbers}}
    trainer = trainer_of(base, stage, tmp_path, changes)
    kept = Counter()  # elements that each frozen linear module keeps, its weights aside
    for name, module in trainer.chunks[0].named_modules():
        weights = dict(module.named_parameters(recurse=False))
        if isinstance(module, te.module.base.TransformerEngineBaseModule) and "weight" in "".join(weights):
            if not any(weight.requires_grad for weight in weights.values()):
                note_saved(module, name, kept)
    with watched(monkeypatch) as seen:
        trainer.train_step()
    assert seen.products["linear weight"] == 0  # attention's projections and the frozen experts
    assert bool(seen.products["grouped weight"]) == (stage == "stage1")  # the new experts
    assert seen.products["linear input"] and seen.products["grouped input"]
    # in stage 2 no gradient of a new expert's output is cast for a product that is not made
    assert bool(seen.columns) == (stage == "stage1" and numbers != "none")
    modules = 2 * 2 * (1 + (numbers != "none"))  # layers x linear modules of attention, and in FP8 of the frozen expert
    assert len(kept) == modules + (2 * 2 if stage == "stage2" else 0)
    # but for the norm before queries, keys and values, whose own gradient needs its input
    assert not {name: size for name, size in kept.items() if size and not name.endswith("linear_qkv")}


def note_saved(module, name, kept) -> None:
    """Count in kept[name] what one module saves that is neither a weight nor a scale."""
    own = {weight.numel() for weight in module.parameters(recurse=False)}
    kept[name] = 0

    def keep(tensor):
        if tensor.numel() not in own and tensor.numel() > 64:
            kept[name] += tensor.numel()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    module.register_forward_pre_hook(lambda *args: hooks.__enter__() and None)
    module.register_forward_hook(lambda *args: hooks.__exit__(None, None, None) and None)
