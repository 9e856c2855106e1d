"""FP8 settings that are refused before anything is built, and those that pass."""

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.checks import check_recipe
from megatron_lpr.recipe.fp8 import check_fp8_here
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.testing.toy_models import write_toy_model

NO_FP8 = {"fp8": {"recipe": "none"}}
DENSE = {"model": {"num_experts": 0}, "train": {"trainable": "all"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture(scope="module")
def arch(base):
    """2 layers, 4 heads of 8, 2 key/value heads, hidden size 32, FFN width 48."""
    return read_architecture(write_toy_model(base / "base"))


def recipe(*layers):
    tree = {
        "name": "x",
        "output": "o",
        "model": {"base": "b", "num_experts": 5, "dtype": "bfloat16"},
        "data": {"manifest": "m", "seq_length": 32},
        "train": {"trainable": "new_experts_and_routers", "steps": 4, "global_batch_size": 8, "micro_batch_size": 1},
        "fp8": {"recipe": "tensorwise"},
    }
    for layer in layers:
        for name, section in layer.items():
            tree[name] = section if section is None else tree.get(name, {}) | section
    return from_tree(Recipe, tree, where="test")


def set_version(monkeypatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


@pytest.mark.parametrize(
    "world_size, sections",
    [
        (1, {}),
        (1, {"fp8": {"recipe": "blockwise", "frozen_weights": "fp8"}}),
        (1, {"fp8": {"bf16_layers_at_start": 1}}),
        (2, {"parallel": {"tensor": 2}}),
        (1, {"fp8": {"format": "e4m3"}}),
        (1, DENSE),
        # what is not trained is not computed in FP8
        (1, {"train": None, "data": None, "model": {"dtype": "float32", "spec": "local"}}),
    ],
)
def test_valid(arch, world_size, sections):
    check_recipe(recipe(sections), arch, world_size)


@pytest.mark.parametrize(
    "world_size, sections, expected",
    [
        (1, NO_FP8 | {"fp8": {"recipe": "none", "format": "e4m3"}}, "fp8.format: e4m3 has no effect with fp8.recipe"),
        (1, {"fp8": {"recipe": "none", "bf16_layers_at_end": 1}}, "fp8.bf16_layers_at_end: 1 has no effect"),
        (1, {"fp8": {"recipe": "none", "frozen_weights": "fp8"}}, "fp8.frozen_weights: fp8 has no effect"),
        (1, {"model": {"spec": "local"}}, "fp8.recipe: tensorwise computes with Transformer Engine's layers"),
        (1, {"model": {"dtype": "float32"}}, r"needs model.dtype: bfloat16 \(it is float32\)"),
        (1, DENSE | {"fp8": {"frozen_weights": "fp8"}}, "fp8.frozen_weights: fp8 has no effect with train.trainable"),
        (1, {"fp8": {"bf16_layers_at_start": 3}}, "fp8.bf16_layers_at_start: 3; at most 2, the model's layers"),
        (
            2,
            {"parallel": {"pipeline": 2}, "fp8": {"bf16_layers_at_end": 2}},
            "bf16_layers_at_end: 2; at most 1, layers / parallel.pipeline",
        ),
        (1, {"fp8": {"bf16_layers_at_start": 1, "bf16_layers_at_end": 1}}, "1 and 1 of 2 layers leave none in FP8"),
        (
            2,
            {"parallel": {"tensor": 2}} | DENSE,
            r"multiples of 16, and the FFN width on a rank \(parallel.tensor\) is 24; the nearest are 16 and 32",
        ),
        (2, {"parallel": {"expert_tensor": 2}}, r"the FFN width on a rank \(parallel.expert_tensor\) is 24"),
        (1, {"fp8": {"recipe": "mxfp8"}}, "multiples of 32, and the FFN width of the base is 48; the nearest are 32"),
        (
            1,
            {"data": {"seq_length": 40}},
            "data.seq_length x train.micro_batch_size: 40 tokens on a rank are no multiple of 16, as fp8.recipe: "
            "tensorwise needs; the nearest are 32 and 48",
        ),
        (4, {"parallel": {"tensor": 2, "context": 2}}, "8 tokens on a rank are no multiple of 16"),
    ],
)
def test_refused(arch, world_size, sections, expected):
    with pytest.raises(UserError, match=expected):
        check_recipe(recipe(sections), arch, world_size)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"hidden_size": 40}, "the hidden size of the base is 40"),
        ({"num_key_value_heads": 1, "head_dim": 12}, "the rows of queries, keys and values of the base is 72"),
    ],
)
def test_widths_of_the_base(base, config, expected):
    arch = read_architecture(write_toy_model(base / expected, **config))
    with pytest.raises(UserError, match=expected):
        check_recipe(recipe(), arch, 1)


def test_whole_blocks_where_sequences_are_gathered(base, monkeypatch):
    arch = read_architecture(write_toy_model(base / "wide", hidden_size=128))
    blockwise = {"fp8": {"recipe": "blockwise"}, "data": {"seq_length": 128}}
    set_version(monkeypatch, "2.11.0")
    narrow = read_architecture(write_toy_model(base / "narrow", hidden_size=64))
    with pytest.raises(UserError, match="needs multiples of 128, and the hidden size of the base is 64"):
        check_recipe(recipe(blockwise, {"parallel": {"tensor": 2}}), narrow, 2)
    check_recipe(recipe(blockwise), arch, 1)
    with pytest.raises(UserError, match="64 tokens on a rank are no multiple of 128, .* the nearest is 128"):
        check_recipe(recipe(blockwise, {"parallel": {"tensor": 2}}), arch, 2)
    check_recipe(recipe(blockwise, {"parallel": {"tensor": 2}, "train": {"micro_batch_size": 2}}), arch, 2)
    set_version(monkeypatch, "2.14.0")
    check_recipe(recipe(blockwise, {"parallel": {"tensor": 2}}), arch, 2)


@pytest.fixture
def transformer_engine(monkeypatch):
    """A function: Transformer Engine as it answers when it is asked for its recipes."""

    def stand_in(**answers):
        loader = SimpleNamespace(needs_no_gpu=True)
        for name in ("_torch", "", ".pytorch", ".pytorch.quantization"):
            module = ModuleType(f"transformer_engine{name}")
            module.__spec__ = ModuleSpec(module.__name__, loader)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        module.FP8GlobalStateManager = SimpleNamespace(**{name: lambda a=a: a for name, a in answers.items()})

    return stand_in


def test_transformer_engine_says_what_the_machine_lacks(transformer_engine):
    transformer_engine(is_fp8_available=(True, ""), is_fp8_block_scaling_available=(False, "CUDA >= 12.9."))
    check_fp8_here(recipe())
    with pytest.raises(UserError, match=r"blockwise does not run here \(CUDA >= 12.9\); set tensorwise or none$"):
        check_fp8_here(recipe({"fp8": {"recipe": "blockwise"}}))
    with pytest.raises(UserError, match=r"\(the installed Transformer Engine has no recipe mxfp8\)"):
        check_fp8_here(recipe({"fp8": {"recipe": "mxfp8"}}))
    transformer_engine(is_fp8_available=(False, "Device compute capability 8.9 or higher required."))
    with pytest.raises(UserError, match=r"tensorwise does not run here \(Device compute .* required\); set none$"):
        check_fp8_here(recipe())
    check_fp8_here(recipe(NO_FP8))


def test_no_transformer_engine(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match=r"mxfp8 does not run here \(it needs Transformer Engine: pip .*\); set none$"):
        check_fp8_here(recipe({"fp8": {"recipe": "mxfp8"}}))
