"""Every layout computes what one process computes: losses, statistics, gradients, and the weights it loads.

Four layers, one frozen and four new experts. What the sizes of a layout leave of the ranks is data parallelism.
"""

import pytest
from layouts import STAGES, Case, Comparison, selected

from megatron_lpr.testing.toy_models import write_toy_model

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    1: {
        "micro_batch_1": {},
        "micro_batch_2": {"micro_batch_size": 2},
        "micro_batch_4": {"micro_batch_size": 4},
        "recompute_full": {"recompute": "full"},
        "recompute_selective": {"recompute": "selective"},
    },
    2: {
        "dp2": {},
        "dp2_micro_batch_2": {"micro_batch_size": 2},
        "dp2_micro_batch_4": {"micro_batch_size": 4},
        "dp2_whole_optimizer": {"distributed_optimizer": False},
        "tp2": {"tensor": 2},
        "pp2": {"pipeline": 2},
        "ep2": {"expert": 2},
        "etp2": {"expert_tensor": 2},
        "cp2": {"context": 2},
        "tp2_ep2": {"tensor": 2, "expert": 2},
        "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
        "tp2_recompute_full": {"tensor": 2, "recompute": "full"},
    },
    4: {
        "dp4": {},
        "dp4_overlap": OVERLAP,
        "pp4": {"pipeline": 4},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
        "pp2_vpp2_overlap_recompute_full": {"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"} | OVERLAP,
        "as_many_ranks_as_new_experts": {"expert": 4},
        "ep4_allgather": {"expert": 4, "dispatcher": "allgather"},
        "ep2_overlap": {"expert": 2} | OVERLAP,
        "etp4": {"expert_tensor": 4},
        "etp2_allgather": {"expert_tensor": 2, "dispatcher": "allgather"},
        "etp2_ep2": {"expert_tensor": 2, "expert": 2},
        "etp2_ep2_allgather": {"expert_tensor": 2, "expert": 2, "dispatcher": "allgather"},
        "tp2_ep4": {"tensor": 2, "expert": 4},
        "tp2_etp2_whole_optimizer": {"tensor": 2, "expert_tensor": 2, "distributed_optimizer": False},
        "tp2_etp2_ep2": {"tensor": 2, "expert_tensor": 2, "expert": 2},
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "pp2_ep2": {"pipeline": 2, "expert": 2},
        "pp2_etp2": {"pipeline": 2, "expert_tensor": 2},
        "tp2_pp2_ep2": {"tensor": 2, "pipeline": 2, "expert": 2},
        "tp2_pp2_ep2_recompute_selective": {"tensor": 2, "pipeline": 2, "expert": 2, "recompute": "selective"},
        "cp4": {"context": 4, "micro_batch_size": 2},
        "cp2_tp2": {"context": 2, "tensor": 2},
        "cp2_pp2": {"context": 2, "pipeline": 2},
        "cp2_ep4_overlap_recompute_full": {"context": 2, "expert": 4, "recompute": "full"} | OVERLAP,
    },
    8: {
        "tp2_pp2_ep4": {"tensor": 2, "pipeline": 2, "expert": 4},
        "tp2_cp2_pp2_ep2": {"tensor": 2, "context": 2, "pipeline": 2, "expert": 2},
    },
}
TRAIN = ("micro_batch_size", "recompute")
NEEDS_EXPERTS = {"expert", "expert_tensor", "dispatcher"}
VARIATIONS = {*TRAIN, *OVERLAP, "dispatcher", "distributed_optimizer"}


def sections(sizes: dict) -> dict:
    """A layout's settings as sections of a recipe."""
    return {
        "parallel": {name: value for name, value in sizes.items() if name not in TRAIN},
        "train": {name: value for name, value in sizes.items() if name in TRAIN},
    }


def stages(sizes: dict) -> list[str]:
    """All that a layout can train; of a variation of another layout only the method's own two."""
    if VARIATIONS & sizes.keys():
        return ["stage1", "stage2"]
    return [stage for stage in STAGES if stage != "dense" or not NEEDS_EXPERTS & sizes.keys()]


# ten steps of post-pretraining show that nothing drifts; the other stages share its layout code
STEPS = {"stage1": 10}
CASES = {
    f"{name}-{stage}": (world_size, Case(stage=stage, changes=sections(sizes), steps=STEPS.get(stage, 2)))
    for world_size, layouts in LAYOUTS.items()
    for name, sizes in layouts.items()
    for stage in stages(sizes)
}
# written after the first step at one layout, read at another
RESUMES = {
    "tp2_pp2_ep2_to_dp4": ("tp2_pp2_ep2", "dp4"),
    "dp4_to_cp2_tp2": ("dp4", "cp2_tp2"),
    "cp4_to_etp2_ep2": ("cp4", "etp2_ep2"),
    "etp2_ep2_to_pp4": ("etp2_ep2", "pp4"),
    "pp4_to_tp2_etp2_ep2": ("pp4", "tp2_etp2_ep2"),
    "etp4_to_pp2_vpp2": ("etp4", "pp2_vpp2"),
    "pp2_vpp2_to_as_many_ranks_as_new_experts": ("pp2_vpp2", "as_many_ranks_as_new_experts"),
}
CASES |= {
    name: (4, Case(stage="stage1", changes=sections(LAYOUTS[4][saved]), resume_at=sections(LAYOUTS[4][read]), steps=3))
    for name, (saved, read) in RESUMES.items()
}
# what loading depends on
LOADS = {
    world_size: {name: sections(sizes) for name, sizes in layouts.items() if not {*TRAIN, *OVERLAP} & sizes.keys()}
    for world_size, layouts in LAYOUTS.items()
}


@pytest.fixture(scope="module")
def comparison(request, tmp_path_factory):
    root, names = tmp_path_factory.mktemp("layouts"), selected(request)
    base = write_toy_model(root / "base", num_hidden_layers=4, tie_word_embeddings=True)
    comparison = Comparison(base, root / "runs", {name: case for name, (_, case) in CASES.items()})
    for world_size, layouts in LOADS.items():
        cases = [name for name, (ranks, _) in CASES.items() if ranks == world_size and name in names]
        loads = {name: sizes for name, sizes in layouts.items() if name in names}
        if cases or loads:
            comparison.run(world_size, cases, loads)
    return comparison


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_one_process(comparison, name):
    comparison.check(name)


@pytest.mark.parametrize("name", [name for loads in LOADS.values() for name in loads])
def test_same_weights_as_one_process(comparison, name):
    comparison.check_loaded(name)


def test_the_steps_of_the_reference_differ(comparison):
    """Otherwise later steps would not show what the optimizer does."""
    for stage, expected in comparison.expected.items():
        losses = [step["lpr_loss" if stage == "stage2" else "ntp_loss"] for step in expected.metrics]
        assert abs(losses[0] - losses[1]) > 1e-4 * losses[0]
        if stage in STEPS:
            assert abs(losses[0] - losses[-1]) > 1e-2 * losses[0]
