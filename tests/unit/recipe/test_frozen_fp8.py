"""Where frozen weights may be held in FP8: what is refused, each in a sentence."""

import pytest
from harness import make_recipe, mixed_batch

from megatron_lpr.errors import UserError
from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.fp8 import check_fp8
from megatron_lpr.testing.toy_models import write_toy_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base", hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"train": {"trainable": "all"}}, "which freezes nothing; leave it out"),
        ({"checkpoint": {"whole": True}}, "checkpoint.whole: true writes frozen weights, .*; leave one of them out"),
        ({"train": {"trainable": "routers"}}, "needs model.load, .*; name it, or set bf16"),
        ({"train": {"trainable": "routers"}, "model": {"load": "stage1"}}, None),
        ({}, None),
    ],
)
def test_what_goes_with_it(base, tmp_path, sections, message):
    common = {
        "model": {"num_experts": 5, "dtype": "bfloat16"},
        "train": {"trainable": "new_experts_and_routers"},
        "fp8": {"recipe": "blockwise", "frozen_weights": "fp8"},
    }
    sections = {name: common.get(name, {}) | sections.get(name, {}) for name in {*common, *sections}}
    recipe = make_recipe(base, mixed_batch(), tmp_path, sections)
    if message is None:
        check_fp8(recipe, read_architecture(base))
        return
    with pytest.raises(UserError, match=message):
        check_fp8(recipe, read_architecture(base))
