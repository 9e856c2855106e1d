"""model.dtype: auto becomes what the machine is fast in, once for a run."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from megatron_lpr.errors import UserError
from megatron_lpr.platform import fast_bfloat16
from megatron_lpr.recipe import dtype
from megatron_lpr.recipe.dtype import check_same_dtype, with_dtype
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe

RECIPE = from_tree(Recipe, {"name": "x", "output": "o", "model": {"base": "b", "dtype": "auto"}}, where="test")


@pytest.mark.parametrize(
    "capabilities, ratio, chosen, why",
    [
        ({"amx_bf16": True, "avx512_bf16": True}, 4.26, "bfloat16", "has amx_bf16, .* 4.3 times"),
        ({"avx512_bf16": True, "amx_bf16": False}, 2.2, "bfloat16", "has avx512_bf16, .* 2.2 times"),
        ({"avx512_bf16": True, "amx_bf16": False}, 0.51, "float32", "has avx512_bf16, .* 0.5 times"),
        ({"avx512_f": True}, None, "float32", "has neither amx_bf16 nor avx512_bf16"),
        ({}, None, "float32", "has neither amx_bf16 nor avx512_bf16"),
    ],
)
def test_of_a_processor(monkeypatch, capabilities, ratio, chosen, why):
    monkeypatch.setattr(fast_bfloat16, "_speed_over_float32", lambda: ratio)  # None: is not asked
    monkeypatch.setattr(fast_bfloat16, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    recipe, line = with_dtype(RECIPE)
    assert recipe.model.dtype == chosen and re.match(rf"{chosen} \(model.dtype: auto\), the processor {why}", line)


def test_speed_is_that_of_a_product(monkeypatch):
    """A clock that only products move: by three in float32, by two in bfloat16, and by more while one is compiled."""
    clock, met = [0.0], set()

    def linear(rows, weight):
        clock[0] += {torch.float32: 3.0, torch.bfloat16: 2.0}[rows.dtype] + (100 if rows.dtype not in met else 0)
        met.add(rows.dtype)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(fast_bfloat16.time, "thread_time", lambda: clock[0])
    threads = torch.get_num_threads()
    assert fast_bfloat16._speed_over_float32.__wrapped__() == 1.5 and torch.get_num_threads() == threads


def test_of_a_processor_that_an_older_torch_does_not_tell(monkeypatch):
    monkeypatch.setattr(fast_bfloat16, "device", lambda: torch.device("cpu"))
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    cpuinfo = "flags\t\t: fpu avx512f avx512_bf16 amx_tile\n"
    monkeypatch.setattr(fast_bfloat16, "Path", lambda name: SimpleNamespace(read_text=lambda: cpuinfo))
    monkeypatch.setattr(fast_bfloat16, "_speed_over_float32", lambda: 2.0)
    is_fast, why = fast_bfloat16.fast_in_bfloat16()
    assert is_fast and why.startswith("the processor has avx512_bf16")


@pytest.mark.parametrize("capability, chosen", [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float32")])
def test_of_a_gpu(monkeypatch, capability, chosen):
    monkeypatch.setattr(fast_bfloat16, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    recipe, line = with_dtype(RECIPE)
    said = ".".join(map(str, capability))
    assert recipe.model.dtype == chosen and line.endswith(f"the GPU has compute capability {said}")


def test_for_other_machines_this_one_is_not_asked(monkeypatch):
    monkeypatch.setattr(dtype, "fast_in_bfloat16", None)
    recipe, line = with_dtype(RECIPE, elsewhere=True)
    assert recipe.model.dtype == "bfloat16" and line.startswith("bfloat16 (model.dtype: auto), as on GPUs; ")


def test_a_run_keeps_its_own(monkeypatch):
    monkeypatch.setattr(dtype, "fast_in_bfloat16", None)  # is not asked
    recipe, line = with_dtype(RECIPE, {"model": {"dtype": "bfloat16"}})
    assert recipe.model.dtype == "bfloat16" and line == "bfloat16 (model.dtype: auto), as the run began"
    said = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, dtype="float32"))
    assert with_dtype(said, {"model": {"dtype": "bfloat16"}}) == (said, None)


def test_ranks_on_machines_of_both_kinds(monkeypatch):
    monkeypatch.setattr(dtype, "collected", lambda lines: sorted([*lines(0, 2), "float32"]))
    check_same_dtype("float32")
    with pytest.raises(UserError, match="model.dtype: auto chooses bfloat16 on some ranks and float32 on others"):
        check_same_dtype("bfloat16")
