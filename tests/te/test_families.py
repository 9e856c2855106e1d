"""Where a family's norms are of other things, Transformer Engine's layers are other ones too."""

import pytest
from fp8_casts import bytes_of_casts
from layouts import Case, Comparison, Part, run_parts, trainer_of

from megatron_lpr.planning.planned import planned
from megatron_lpr.testing.toy_models import write_toy_model

RANKS = 2
CHANGES = {"model": {"spec": "te"}, "parallel": {"tensor": RANKS}}
CASES = {stage: Case(stage=stage, changes=CHANGES) for stage in ("moe_full", "dense")}


@pytest.fixture(scope="module")
def comparison(on_ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    base = write_toy_model(root / "base", architectures=["Olmo2ForCausalLM"], model_type="olmo2")
    found = Comparison(base, root / "runs", CASES)
    run_parts(on_ranks, RANKS, [Part(comparison=found, cases=list(CASES))])
    return found


def test_a_linear_layer_without_a_norm_before_it_casts_its_lowest_weight_once(megatron, tmp_path):
    """In FP8: nothing below asks for a gradient. With the norm Transformer Engine casts both ways all the same."""
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    base = write_toy_model(tmp_path / "base", architectures=["Olmo2ForCausalLM"], model_type="olmo2", **sizes)
    changes = {"model": {"spec": "te", "dtype": "bfloat16"}, "fp8": {"recipe": "tensorwise", "frozen_weights": "bf16"}}
    trainer = trainer_of(base, "stage1", tmp_path / "run", changes)
    trainer.train_step()
    memory, _ = planned(trainer.recipe, trainer.plan.arch, 1, 0)
    assert memory.casts == bytes_of_casts(trainer)


@pytest.mark.parametrize("name", CASES)
def test_norms_of_what_leaves_and_of_all_heads(comparison, name):
    comparison.check(name)
