"""Every family at every layout: each rank fills its own part, and together they are the model, byte for byte.

HF -> Megatron at a layout -> distributed checkpoint -> one process -> HF. Every parameter is NaN before the import.
The checkpoints of one family are whole, the others hold what their base does not.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from fake_checkpoints import BASE
from safetensors.torch import load_file
from tiny_models import rewrite, save_tiny, train_a_little

from megatron_lpr.conversion.export.export import export_checkpoint, upcycle_hf
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.platform import leave_layout, megatron
from megatron_lpr.recipe.checks import architecture_of
from megatron_lpr.recipe.reading import from_tree, to_tree
from megatron_lpr.recipe.settings import Recipe

WHOLE = "qwen2"
FAMILIES = ("llama_tied_llama3_head_dim", "mistral_window", "qwen2", "qwen3", "olmo2")
LAYOUTS = {
    2: {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "ep2": {"expert": 2}},
    4: {
        "tp2_pp2_ep2": {"tensor": 2, "pipeline": 2, "expert": 2},
        "pp2_vpp2_etp2": {"pipeline": 2, "virtual_pipeline": 2, "expert_tensor": 2},
    },
}
# base folder, experts of the model, frozen ones of them
SOURCES = {"dense": ("dense", 5, 1), "moe": ("moe", 5, 1), "again": ("moe", 9, 5), "mixed": ("dense", 5, 1)}
# a dense base at every layout, one that has experts where several sizes come together
SOURCES_AT = {layout: ("dense",) for layout in LAYOUTS[2]} | {
    "tp2_pp2_ep2": ("dense", "moe", "again"),
    "pp2_vpp2_etp2": ("dense", "moe"),
}
CASES = [
    (family, layout, source)
    for family in FAMILIES
    for layout, sources in SOURCES_AT.items()
    for source in sources
    # the tensors of the one are Llama's, of the other Llama's but for the norms
    if family not in ("mistral_window", "olmo2") or layout == "tp2_pp2_ep2"
] + [("qwen3", "pp2_vpp2_etp2", "mixed")]


def recipe_of(root: Path, family: str, layout: str, source: str) -> Recipe:
    base, num_experts, num_frozen = SOURCES[source]
    tree = {
        "name": "test",
        "output": str(root / family / f"{layout}_{source}"),
        "model": {
            "base": str(root / family / base),
            "num_experts": num_experts,
            "num_frozen_experts": num_frozen,
            "mlp_only_layers": list(mlp_only_layers(source)),
            "router_init_std": 0.1,
            "router_init_seed": 3,
        },
        "parallel": (LAYOUTS[2] | LAYOUTS[4])[layout],
    }
    return from_tree(Recipe, tree, where="test")


def mlp_only_layers(source: str) -> tuple[int, ...]:
    return (1, 2) if source == "mixed" else ()


def poison(chunks) -> None:
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)


def assert_all_written(chunks) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert parameter.isfinite().all(), f"{name} was not written"


def convert(root: Path, cases: list[tuple[str, str, str]]) -> None:
    """On each rank: HF -> Megatron at the layout of each case -> checkpoint."""
    with megatron():
        from megatron_lpr.checkpoint.base_files import BaseFiles
        from megatron_lpr.checkpoint.run_state import RunState
        from megatron_lpr.checkpoint.same_run import base_identity
        from megatron_lpr.checkpoint.save import save_checkpoint
        from megatron_lpr.model.builder import build_model, init_model_parallel
        from megatron_lpr.model.load.weights import fill_weights

        for case in cases:
            recipe = recipe_of(root, *case)
            arch = architecture_of(recipe.model)
            init_model_parallel(recipe.parallel)
            chunks = build_model(recipe, arch)
            poison(chunks)
            fill_weights(recipe, arch, chunks, None)
            assert_all_written(chunks)
            state = RunState(step=0, consumed_samples=0, has_optimizer=False, recipe=to_tree(recipe), base=BASE)
            if case[0] != WHOLE:
                base = base_identity(recipe.model.base, arch) | {"files": BaseFiles(recipe.model.base).digests()}
                state = dataclasses.replace(state, content="over base", base=base)
            folder = save_checkpoint(recipe.output, state, chunks)
            poison(chunks)
            fill_weights(recipe, arch, chunks, folder)
            assert_all_written(chunks)
            del chunks
            leave_layout()


@pytest.fixture(scope="module")
def root(on_ranks, tmp_path_factory):
    """<root>/<family>/dense and /moe, the latter with experts that differ; a checkpoint of every case beside them."""
    root = tmp_path_factory.mktemp("conversion")
    for family in FAMILIES:
        save_tiny(family, root / family / "dense", num_hidden_layers=4)
        rewrite(upcycle_hf(root / family / "dense", root / family / "moe", Expansion(num_experts=5)), train_a_little)
        for source, (base, num_experts, num_frozen) in SOURCES.items():
            if source == "mixed" and not family.startswith("qwen"):
                continue
            upcycle_hf(
                root / family / base,
                root / family / f"expected_{source}",
                Expansion(
                    num_experts=num_experts,
                    num_frozen=num_frozen,
                    router_std=0.1,
                    router_seed=3,
                    mlp_only_layers=mlp_only_layers(source),
                ),
            )
    for world_size, layouts in LAYOUTS.items():
        on_ranks(convert, world_size, root, [case for case in CASES if case[1] in layouts])
    return root


def test_what_is_expected_is_the_base(root):
    """The bytes that the layouts are compared with, against the base itself: attention and experts 0 to 4."""
    for family in FAMILIES:
        moe, again, same = (
            load_file(root / family / name / "model.safetensors") for name in ("moe", "expected_again", "expected_moe")
        )
        assert same.keys() == moe.keys() and all(torch.equal(same[name], moe[name]) for name in moe)
        for name, tensor in moe.items():
            assert torch.equal(again[name][: len(tensor)], tensor), name
        new = [name for name in again.keys() - moe.keys()]
        assert len(new) == 4 * 4 * 3  # layers, new experts, weights
        assert all(torch.equal(again[name], again[_of_expert_0(name)]) for name in new)


def _of_expert_0(name: str) -> str:
    before, after = name.split(".experts.")
    return f"{before}.experts.0.{after.split('.', 1)[1]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_same_bytes(root, tmp_path, family):
    for case in (case for case in CASES if case[0] == family):
        recipe = recipe_of(root, *case)
        out = export_checkpoint(recipe.output, tmp_path / "_".join(case), base_dir=recipe.model.base)
        expected = root / family / f"expected_{case[2]}"
        for file in ("model.safetensors", "config.json"):
            assert (out / file).read_bytes() == (expected / file).read_bytes(), (case, file)
