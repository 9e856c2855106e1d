"""Every recipe under examples/ passes the checks that a run of it passes, on as many ranks as its layout needs."""

import math
from pathlib import Path

import pytest

from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.checks import check_recipe
from megatron_lpr.recipe.reading import load_recipe

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPES = sorted(EXAMPLES.rglob("*.yaml"))
GPUS = {"8b": 16, "70b": 512}  # H100s that the recipes in these folders are for


@pytest.fixture(scope="module")
def arch(tmp_path_factory):
    """A Llama, as the base models of most examples are, with as many positions as the recipes read."""
    from megatron_lpr.testing.toy_models import write_toy_model

    folder = tmp_path_factory.mktemp("examples") / "base"
    return read_architecture(write_toy_model(folder, max_position_embeddings=2048))


@pytest.mark.parametrize("folder", ["recipes", "quickstart/recipes"])
def test_there_are_the_recipes_that_readme_and_docs_name(folder):
    names = {"common.yaml", "stage1.yaml", "stage2.yaml", "upcycle.yaml"}
    assert names <= {path.name for path in (EXAMPLES / folder).iterdir()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_recipe_passes_the_checks(path, arch):
    recipe = load_recipe(str(path))
    sizes = recipe.parallel
    own = EXAMPLES / "plan" / Path(recipe.model.base).name.lower()
    if own.is_dir() and path.parent.name in GPUS:
        arch = read_architecture(own)  # layouts of large models divide no toy
    dense_ranks = sizes.tensor * sizes.context * sizes.pipeline
    expert_ranks = sizes.expert_tensor * sizes.expert * sizes.pipeline
    check_recipe(recipe, arch, math.lcm(dense_ranks, expert_ranks))
    assert (recipe.train is not None) == (path.name not in ("common.yaml", "upcycle.yaml"))
    assert recipe.evaluation.corpora


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name in GPUS], ids=lambda path: path.stem)
def test_recipe_of_a_large_model_fits_its_gpus(path):
    from megatron_lpr.planning.hardware import gpu_named
    from megatron_lpr.planning.layout import Layouts

    recipe = load_recipe(str(path))
    arch = read_architecture(EXAMPLES / "plan" / Path(recipe.model.base).name.lower())
    gpu = gpu_named("h100")
    memory, _ = Layouts(recipe, arch, GPUS[path.parent.name], gpu).memory(recipe.train)
    assert memory.total <= gpu.usable, memory
