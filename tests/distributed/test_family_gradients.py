"""What only some families have, with tensor parallelism: biases and norms of q and k, a window, RoPE side by side,
norms of all heads together and of what leaves attention and FFN."""

import pytest
from layouts import Case, Comparison, Part, run_parts

from megatron_lpr.testing.toy_models import write_toy_model

FAMILIES = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    "helium": {"architectures": ["HeliumForCausalLM"], "model_type": "helium", "head_dim": 16},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
}
RANKS = 2
CASE = Case(stage="moe_full", changes={"parallel": {"tensor": 2, "expert": 2}})


@pytest.fixture(scope="module")
def comparisons(on_ranks, tmp_path_factory):
    """By family; one launch for all."""
    root = tmp_path_factory.mktemp("families")
    found = {}
    for name, fields in FAMILIES.items():
        found[name] = Comparison(write_toy_model(root / name, **fields), root / f"{name}_runs", {name: CASE})
    run_parts(on_ranks, RANKS, [Part(comparison=found[name], cases=[name]) for name in found])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_one_process(comparisons, family):
    comparisons[family].check(family)
