"""FP8 on two ranks, in one layout and on from its checkpoint in another, against one process in FP8."""

import pytest
from layouts import Case, run_cases, write_source

from megatron_lpr.testing.toy_models import write_toy_model

STEPS = {"ntp_loss": 2e-2, "balance_loss": 5e-2, "grad_norm": 0.15}


def in_fp8(recipe: str, recompute: str = "none", frozen_weights: str = "bf16", **parallel: int | str) -> dict:
    return {
        "model": {"spec": "te", "dtype": "bfloat16"},
        # 32 tokens of a pass, 16 of them on each of two tensor-parallel ranks
        "train": {"micro_batch_size": 2, "recompute": recompute},
        "fp8": {"recipe": recipe, "frozen_weights": frozen_weights},
        "parallel": parallel,
    }


CASES = {
    "tensorwise": [
        (in_fp8("tensorwise", tensor=2), in_fp8("tensorwise", expert=2, frozen="sharded")),
        (
            in_fp8("tensorwise", expert=2),
            in_fp8("tensorwise", "selective", "fp8", tensor=2, expert=2, frozen="sharded"),
        ),
    ],
    "blockwise": [(in_fp8("blockwise", expert=2), in_fp8("blockwise", "full", "fp8", pipeline=2))],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, on_ranks):
    """By recipe: the metrics of each step of one process, and of each of two ranks in the cases."""
    from megatron_lpr.platform import leave_layout, megatron

    folder = tmp_path_factory.mktemp("fp8")
    base = write_toy_model(folder / "base", hidden_size=64, intermediate_size=96)
    with megatron():
        source = write_source(base, folder / "source")
        leave_layout()
    alone = [Case(stage="stage1", changes=in_fp8(recipe)) for recipe in CASES]
    on_two = [Case(stage="stage1", changes=a, resume_at=b) for of_recipe in CASES.values() for a, b in of_recipe]
    ((of_one, _),) = run_cases(1, [(base, source, alone, [])])
    of_ranks = [found[0][0] for found in on_ranks(run_cases, 2, 2, [(base, source, on_two, [])])]
    runs, taken = {}, 0
    for recipe, (expected, _) in zip(CASES, of_one, strict=True):
        of_recipe = range(taken, taken := taken + len(CASES[recipe]))
        runs[recipe] = expected, [[rank[case][0] for rank in of_ranks] for case in of_recipe]
    return runs


@pytest.mark.parametrize("recipe", CASES)
def test_another_layout_computes_the_same_but_for_rounding(runs, recipe):
    expected, cases = runs[recipe]
    for case, (first, second) in enumerate(cases):
        assert first == second, f"case {case}: metrics differ between ranks"
        for step, (got, one) in enumerate(zip(first, expected, strict=True), start=1):
            for name, tolerance in STEPS.items():
                assert got[name] == pytest.approx(one[name], rel=tolerance), (case, step, name)
