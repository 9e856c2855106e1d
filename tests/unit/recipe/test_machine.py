"""What the machine that trains must have: another may plan a run, and look at it as it will be there."""

import importlib.util

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.checks import check_machine, check_recipe, use_transformer_engine
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe

FLEX = {"parallel": {"expert": 2, "dispatcher": "flex"}}
BESIDE = {"parallel": {"expert": 2, "overlap_frozen": True, "frozen": "replicated"}}
WANDB = {"logging": {"wandb": "offline"}}


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpu, *packages)` is what this one seems to be."""

    def has(gpu: bool, *packages: str) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)

    return has


@pytest.mark.parametrize(
    "sections, gpu, packages, lacking",
    [
        ({"model": {"spec": "te"}}, True, [], "model.spec: te needs Transformer Engine: pip install .*, or use local"),
        ({"model": {"spec": "te"}}, False, [], "model.spec: te needs a GPU, .*, or use local"),
        ({"model": {"spec": "te"}}, False, ["transformer_engine"], "model.spec: te needs a GPU, .*, or use local"),
        (
            FLEX,
            False,
            ["deep_ep"],
            r"parallel.dispatcher: flex needs CUDA \(it runs on DeepEP\); use alltoall or allgather",
        ),
        (
            FLEX,
            True,
            [],
            r"parallel.dispatcher: flex needs the package deep_ep \(DeepEP\); install it, or use alltoall",
        ),
        (FLEX, True, ["deep_ep"], None),
        (BESIDE, False, [], "parallel.overlap_frozen: on needs CUDA, .*; leave it out"),
        (BESIDE, True, [], None),
        (WANDB, True, [], "logging.wandb: offline needs the package wandb: .*, or set off"),
        (WANDB, False, ["wandb"], None),
    ],
)
def test_lacking_here_and_right_elsewhere(toy_base, machine, sections, gpu, packages, lacking):
    machine(gpu, *packages)
    tree = {
        "name": "x",
        "output": "o",
        "model": {"base": str(toy_base), "num_experts": 5} | sections.get("model", {}),
        "data": {"manifest": "m", "seq_length": 32, "mixture": {"expanded": 0.5, "original": 0.5}},
        "train": {"trainable": "routers", "steps": 4, "global_batch_size": 8, "micro_batch_size": 2},
    }
    recipe = from_tree(Recipe, sections | tree, where="test")
    check_recipe(recipe, read_architecture(toy_base), 2)
    if lacking is None:
        return check_machine(recipe)
    with pytest.raises(UserError, match=f"^{lacking}$"):
        check_machine(recipe)


def test_auto_takes_transformer_engine_where_it_computes(machine):
    machine(True, "transformer_engine")
    assert [use_transformer_engine(spec) for spec in ("auto", "te", "local")] == [True, True, False]
    for gpu in (True, False):
        machine(gpu)
        assert not use_transformer_engine("auto")
