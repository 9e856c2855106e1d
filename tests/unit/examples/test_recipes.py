"""Every recipe under examples/ is one, and fits its own sizes."""

from pathlib import Path

import pytest

from megatron_lpr.recipe.reading import load_recipe

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPES = sorted(EXAMPLES.rglob("*.yaml"))


def test_there_are_recipes():
    assert {"stage1.yaml", "stage2.yaml", "upcycle.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_recipe_is_read(path):
    recipe = load_recipe(str(path))
    if recipe.train is not None:
        assert recipe.data is not None
        assert recipe.train.global_batch_size % recipe.train.micro_batch_size == 0
        assert not recipe.lpr.coeff or recipe.data.mixture["original"] > 0
    if recipe.model.num_experts:
        new = recipe.model.num_experts - recipe.model.num_frozen_experts
        assert new > 0 and new % recipe.parallel.expert == 0
