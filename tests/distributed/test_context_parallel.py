"""Sequences split over ranks, without Transformer Engine: losses and gradients of one process.

Of two ranks the first has positions 0-3 and 12-15 of 16, the second those between: in `unfair_batch` either has
sequences without an original token of which the other has some, and sequences that are nothing but padding.
"""

import pytest
from full_gradients import assemble, assert_same, run_cases, two_steps, write_source

from megatron_lpr.platform import megatron
from megatron_lpr.testing.run_distributed import run_distributed

TWO_SAMPLES = {"train": {"micro_batch_size": 2}}
LAYOUTS = {
    "cp2_dp2": {"parallel": {"context": 2}, **TWO_SAMPLES},
    "cp4": {"parallel": {"context": 4}, **TWO_SAMPLES},
    "cp2_tp2": {"parallel": {"context": 2, "tensor": 2}, **TWO_SAMPLES},
    "cp2_pp2": {"parallel": {"context": 2, "pipeline": 2}, **TWO_SAMPLES},
    "cp2_ep2": {"parallel": {"context": 2, "expert": 2}, **TWO_SAMPLES},
    "cp2_ep4_recompute": {
        "parallel": {"context": 2, "expert": 4, "overlap_grad_reduce": True, "overlap_param_gather": True},
        "train": {"micro_batch_size": 2, "recompute": "full"},
    },
}
CASES = [(layout, stage) for layout in LAYOUTS for stage in ("stage1", "stage2")]
CASES += [("cp2_tp2", "moe_full"), ("cp4", "dense")]


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory):
    """Metrics and whole gradients by (layout, stage), and of one process by stage."""
    with megatron():
        source = write_source(toy_base, tmp_path_factory.mktemp("source"))
        expected = {}
        for stage in {stage for _, stage in CASES}:
            metrics, parts = two_steps(toy_base, stage, source)
            expected[stage] = metrics, assemble([parts])
    by_rank = run_distributed(run_cases, 4, toy_base, source, 4, [(stage, LAYOUTS[name]) for name, stage in CASES])
    results = {}
    for case, outcomes in zip(CASES, zip(*by_rank, strict=True), strict=True):
        metrics = [metrics for metrics, _ in outcomes]
        assert all(step == metrics[0] for step in metrics), f"{case}: metrics differ between ranks"
        results[case] = metrics[0], assemble([parts for _, parts in outcomes])
    return results, expected


@pytest.mark.parametrize("layout, stage", CASES)
def test_split_sequences_give_the_same_numbers(runs, layout, stage):
    results, expected = runs
    assert_same(results[layout, stage], expected[stage], f"{layout} {stage}")
