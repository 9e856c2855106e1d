"""What attention keeps, by how heads share keys and values and which of them lie on a rank: planned as rehearsed."""

import json
from pathlib import Path

import pytest

from megatron_lpr.families import read_architecture
from megatron_lpr.planning.planned import planned
from megatron_lpr.planning.rehearsal import Part, rehearse
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.megatron]
QWEN3 = Path(__file__).parents[3] / "examples/plan/qwen3-8b/config.json"
OLMO2 = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "head_dim": None}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
# tensor-parallel size, fields of config.json of two layers of Qwen3 8B, changes of the recipe
CASES = {
    "normed_heads": (1, {}, {}),
    "normed_heads_of_one_group": (8, {}, {}),
    "normed_heads_that_share_none": (1, {"num_key_value_heads": 32}, {}),
    "normed_together": (2, OLMO2, {}),
    "normed_together_of_one_group": (8, OLMO2, {}),
    "normed_together_that_share_none": (2, OLMO2 | {"num_key_value_heads": 32}, {}),
    "attention_learns": (1, LLAMA, {"train.trainable": "all"}),
    "attention_learns_over_context": (1, LLAMA, {"train.trainable": "all", "parallel.context": 2}),
    "documents": (1, LLAMA, {"data.reset_attention": True}),
    "documents_over_context": (2, LLAMA, {"data.reset_attention": True, "parallel.context": 2}),
}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    parts, config = [], json.loads(QWEN3.read_text(encoding="utf-8"))
    for name, (tensor, fields, changes) in CASES.items():
        base = tmp_path_factory.mktemp(name)
        (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2} | fields), encoding="utf-8")
        tree = {
            "name": "rehearsal",
            "output": "none",
            "model": {"base": str(base), "num_experts": 2, "dtype": "bfloat16", "spec": "local"},
            "data": {"manifest": "none", "seq_length": 4096},
            "train": {"trainable": "routers", "steps": 1, "global_batch_size": 8},
            "parallel": {"tensor": tensor, "frozen": "replicated"},
        }
        for field, value in changes.items():
            section, setting = field.split(".")
            tree[section][setting] = value
        recipe = from_tree(Recipe, tree, where="test")
        parts.append(Part(recipe=recipe, arch=read_architecture(base), world_size=8))
    return dict(zip(CASES, zip(parts, rehearse(parts), strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_saved_tensors(rehearsed, name):
    part, found = rehearsed[name]
    memory, _ = planned(part.recipe, part.arch, part.world_size, part.rank)
    assert memory.activations == pytest.approx(found.memory.activations, rel=0.01)
