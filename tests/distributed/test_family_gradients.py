"""What only some families have, trained with tensor parallelism: biases of q, k and v, norms of q and k, a window."""

from pathlib import Path

import pytest
from layouts import Case, Comparison, run_case

from megatron_lpr.platform import megatron
from megatron_lpr.testing.run_distributed import run_distributed
from megatron_lpr.testing.toy_models import write_toy_model

FAMILIES = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
}
RANKS = 2
CASE = Case(stage="moe_full", changes={"parallel": {"tensor": 2, "expert": 2}})


def run_families(models: list[tuple[Path, Path]]) -> list:
    """On each rank: `run_case` of every (base, source)."""
    with megatron():
        return [run_case(base, CASE, source, source / "unused", RANKS) for base, source in models]


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """By family; one launch for all."""
    root = tmp_path_factory.mktemp("families")
    found = {}
    for name, fields in FAMILIES.items():
        found[name] = Comparison(write_toy_model(root / name, **fields), root / f"{name}_runs", {name: CASE})
    by_rank = run_distributed(run_families, RANKS, [(one.base, one.source) for one in found.values()])
    for name, ranks in zip(found, zip(*by_rank, strict=True), strict=True):
        found[name].take(name, ranks)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_one_process(comparisons, family):
    comparisons[family].check(family)
