"""What only some families have, trained with tensor parallelism: biases of q, k and v, norms of q and k, a window."""

import pytest
from layouts import LOSSES, two_steps, write_source

from megatron_lpr.platform import leave_layout, megatron
from megatron_lpr.testing.run_distributed import run_distributed
from megatron_lpr.testing.toy_models import write_toy_model

FAMILIES = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
}
LAYOUT = {"tensor": 2, "expert": 2}


def run_families(bases, sources) -> dict[str, list]:
    """On each rank: both steps of every family, in which everything is trained."""
    results = {}
    with megatron():
        for name, base in bases.items():
            results[name] = two_steps(base, "all", sources[name], 2, **LAYOUT)
            leave_layout()
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    bases = {name: write_toy_model(root / name, **fields) for name, fields in FAMILIES.items()}
    sources, expected = {}, {}
    for name, base in bases.items():
        with megatron():
            sources[name] = write_source(base, root / f"{name}_source")
        with megatron():
            expected[name] = two_steps(base, "all", sources[name], 1)
    return run_distributed(run_families, 2, bases, sources)[0], expected


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradient_norms_of_one_process(runs, family):
    """Those of the second step show what the optimizer did with every weight."""
    results, expected = runs
    for step, (got, want) in enumerate(zip(results[family], expected[family], strict=True)):
        for name in LOSSES:
            assert got[name] == pytest.approx(want[name], rel=1e-5), (step, name)
