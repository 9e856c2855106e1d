"""Every layout computes what one process computes: losses and gradient norm of two steps, from one checkpoint."""

import pytest
from layouts import LOSSES, STAGES, run_layouts, two_steps, write_source

from megatron_lpr.platform import megatron
from megatron_lpr.testing.run_distributed import run_distributed
from megatron_lpr.testing.toy_models import write_toy_model

LAYOUTS = {
    2: {
        "dp2": {},
        "dp2_whole_optimizer": {"distributed_optimizer": False},
        "dp2_overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
        "tp2": {"tensor": 2},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
        "ep2": {"expert": 2},
        "ep2_allgather": {"expert": 2, "dispatcher": "allgather"},
        "tp2_ep2": {"tensor": 2, "expert": 2},
        "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
        "etp2": {"expert_tensor": 2},
    },
    4: {
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "pp2_ep2": {"pipeline": 2, "expert": 2},
        "tp2_ep2_etp2": {"tensor": 2, "expert": 2, "expert_tensor": 2},
    },
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def runs(request, tmp_path_factory):
    """Metrics by (layout, stage), and of one process by stage; one launch per number of ranks."""
    root = tmp_path_factory.mktemp(request.param)
    base = write_toy_model(root / "base", num_hidden_layers=4, tie_word_embeddings=request.param == "tied")
    with megatron():
        source = write_source(base, root / "source")
    expected = {}
    for stage in STAGES:
        with megatron():
            expected[stage] = two_steps(base, stage, source, 1)
    stages = list(STAGES) if request.param == "untied" else ["all"]  # frozen embeddings are the same, tied or not
    results = {}
    for world_size, layouts in LAYOUTS.items():
        cases = [(name, stage) for name in layouts for stage in stages]
        arguments = [(stage, layouts[name]) for name, stage in cases]
        by_rank = run_distributed(run_layouts, world_size, base, source, world_size, arguments)
        assert all(rank == by_rank[0] for rank in by_rank)  # every rank knows the whole step's metrics
        results |= dict(zip(cases, by_rank[0], strict=True))
    return results, expected


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts])
def test_layout_computes_what_one_process_computes(runs, layout):
    results, expected = runs
    compared = 0
    for stage in expected.keys() & {stage for name, stage in results if name == layout}:
        for step, (got, want) in enumerate(zip(results[layout, stage], expected[stage], strict=True)):
            for name in LOSSES:
                assert got[name] == pytest.approx(want[name], rel=1e-5), (stage, step, name)
                compared += 1
    assert compared


def test_the_steps_of_the_reference_differ(runs):
    """Otherwise the second step would not show what the optimizer does."""
    for stage, (first, second) in runs[1].items():
        loss = "lpr_loss" if stage == "stage2" else "ntp_loss"
        assert abs(first[loss] - second[loss]) > 1e-4 * first[loss]
