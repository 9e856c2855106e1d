"""Where a family's norms are of other things, Transformer Engine's layers are other ones too."""

import pytest
from layouts import Case, Comparison, Part, run_parts

from megatron_lpr.testing.toy_models import write_toy_model

LAYOUTS = {1: "one", 2: "tp2"}
STAGES = ("moe_full", "dense")
CASES = {
    f"{name}-{stage}": (ranks, Case(stage=stage, changes={"model": {"spec": "te"}, "parallel": {"tensor": ranks}}))
    for ranks, name in LAYOUTS.items()
    for stage in STAGES
}


@pytest.fixture(scope="module")
def comparison(on_ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    base = write_toy_model(root / "base", architectures=["Olmo2ForCausalLM"], model_type="olmo2")
    found = Comparison(base, root / "runs", {name: case for name, (_, case) in CASES.items()})
    for ranks in LAYOUTS:
        cases = [name for name, (needed, _) in CASES.items() if needed == ranks]
        run_parts(on_ranks, ranks, [Part(comparison=found, cases=cases)])
    return found


@pytest.mark.parametrize("name", CASES)
def test_norms_of_what_leaves_and_of_all_heads(comparison, name):
    comparison.check(name)
