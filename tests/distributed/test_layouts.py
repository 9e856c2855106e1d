"""Every layout computes what one process computes: losses and gradient norm of two steps, from one checkpoint."""

import pytest
from layouts import LOSSES, STAGES, run_layouts, two_steps, write_source

from megatron_lpr.platform import megatron
from megatron_lpr.testing.run_distributed import run_distributed

LAYOUTS = {
    2: {
        "dp2": {},
        "tp2": {"tensor": 2},
        "pp2": {"pipeline": 2},
        "ep2": {"expert": 2},
        "tp2_ep2": {"tensor": 2, "expert": 2},
        "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
    },
    4: {
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "pp2_ep2": {"pipeline": 2, "expert": 2},
    },
}


@pytest.fixture(scope="module")
def runs(toy_tied, tmp_path_factory):
    """Metrics by (layout, stage), and of one process by stage; one launch per number of ranks."""
    with megatron():
        source = write_source(toy_tied, tmp_path_factory.mktemp("source"))
    expected = {}
    for stage in STAGES:
        with megatron():
            expected[stage] = two_steps(toy_tied, stage, source, 1)
    results = {}
    for world_size, layouts in LAYOUTS.items():
        cases = [(name, stage) for name in layouts for stage in STAGES]
        arguments = [(stage, layouts[name]) for name, stage in cases]
        by_rank = run_distributed(run_layouts, world_size, toy_tied, source, world_size, arguments)
        assert all(rank == by_rank[0] for rank in by_rank)  # every rank knows the whole step's metrics
        results |= dict(zip(cases, by_rank[0], strict=True))
    return results, expected


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts])
def test_layout_computes_what_one_process_computes(runs, layout, stage):
    results, expected = runs
    for step, (got, want) in enumerate(zip(results[layout, stage], expected[stage], strict=True)):
        assert (want["balance_loss"] is None) == (stage == "stage2")
        for name in LOSSES:
            assert got[name] == (want[name] and pytest.approx(want[name], rel=1e-5)), (step, name)


def test_the_steps_of_the_reference_differ(runs):
    """Otherwise the second step would not show what the optimizer does."""
    for stage, (first, second) in runs[1].items():
        loss = "lpr_loss" if stage == "stage2" else "ntp_loss"
        assert abs(first[loss] - second[loss]) > 1e-4 * first[loss]
