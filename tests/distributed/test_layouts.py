"""Every layout computes what one process computes: losses, statistics, gradients, and the weights it loads.

One frozen and four new experts; two layers, or four where the pipeline needs or shows more. What the sizes of a layout
leave of the ranks is data parallelism.
"""

import numpy as np
import pytest
from layouts import STAGES, Case, Comparison, Part, Sections, run_parts, selected, unfair_batch

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
# frozen weights gathered when they compute; of eight ranks two layouts are enough
SHARDED = {
    2: {
        "dp2_sharded": {},
        "tp2_sharded_recompute_full": {"tensor": 2, "recompute": "full"},
        "ep2_sharded_recompute_selective": {"expert": 2, "recompute": "selective"},
        "cp2_sharded": {"context": 2},
    },
    4: {
        "dp4_sharded": {},
        "dp4_sharded_overlap_recompute_full": OVERLAP | {"recompute": "full"},
        "ep4_sharded": {"expert": 4},
        "pp2_sharded": {"pipeline": 2},
        "pp2_vpp2_sharded_recompute_selective": {"pipeline": 2, "virtual_pipeline": 2, "recompute": "selective"},
        "tp2_ep2_sharded": {"tensor": 2, "expert": 2},
    },
    8: {"tp2_pp2_ep2_sharded": {"tensor": 2, "pipeline": 2, "expert": 2}},
}
for ranks, layouts in SHARDED.items():
    LAYOUTS[ranks] |= {name: sizes | {"frozen": "sharded"} for name, sizes in layouts.items()}
# the same layouts with a copy of the frozen weights on each rank
REPLICATED = {
    "dp2_sharded": "dp2",
    "cp2_sharded": "cp2",
    "dp4_sharded": "dp4",
    "ep4_sharded": "as_many_ranks_as_new_experts",
}
# as on a GPU: where weights are on their way when their layer begins, sharded, recomputed, or few
GROUPED = {
    1: {"grouped": {}},
    2: {"dp2_sharded_grouped": {"frozen": "sharded"}, "tp2_grouped_recompute_full": {"tensor": 2, "recompute": "full"}},
    4: {
        "dp4_overlap_grouped": OVERLAP,
        "ep2_overlap_grouped": {"expert": 2} | OVERLAP,
        "pp2_vpp2_overlap_grouped": {"pipeline": 2, "virtual_pipeline": 2} | OVERLAP,
        "etp2_ep2_grouped": {"expert_tensor": 2, "expert": 2},
    },
}
for ranks, layouts in GROUPED.items():
    LAYOUTS[ranks] |= {name: sizes | {"experts": "grouped"} for name, sizes in layouts.items()}
# as on a GPU in fp32, or with large experts
LOOPED = {1: {"looped": {}}, 4: {"dp4_overlap_looped": OVERLAP, "etp2_ep2_looped": {"expert_tensor": 2, "expert": 2}}}
for ranks, layouts in LOOPED.items():
    LAYOUTS[ranks] |= {name: sizes | {"experts": "looped"} for name, sizes in layouts.items()}
TRAIN = ("micro_batch_size", "recompute")
NEEDS_EXPERTS = {"expert", "expert_tensor", "dispatcher"}
SAMPLES = len(unfair_batch().tags_BS)
VARIATIONS = {*TRAIN, *OVERLAP, "dispatcher", "distributed_optimizer", "frozen", "experts"}


def sections(world_size: int, sizes: dict) -> dict:
    """A layout's settings as sections of a recipe.

    Where data is all that is split each sample is a micro-batch. Else a step has two for each pipeline stage if it can:
    enough for all that a schedule does, and every further one takes as long as these.
    """
    pipeline = sizes.get("pipeline", 1)
    copies = world_size // (sizes.get("tensor", 1) * pipeline * sizes.get("context", 1))
    micro_batch_size = 1 if copies == world_size else max(1, SAMPLES // copies // (2 * pipeline))
    return {
        "parallel": {name: value for name, value in sizes.items() if name not in (*TRAIN, "experts")},
        "train": {"micro_batch_size": micro_batch_size} | {n: value for n, value in sizes.items() if n in TRAIN},
    }


def stages(sizes: dict) -> list[str]:
    """All that a layout can train; of a variation of another layout only the method's own two."""
    if VARIATIONS & sizes.keys():
        return ["stage1", "stage2"]
    return [stage for stage in STAGES if stage != "dense" or not NEEDS_EXPERTS & sizes.keys()]


# five steps of post-pretraining show that nothing drifts, where every kind of parallelism is once; the second step
# shows what the optimizer did, and the third that it goes on
FIVE_STEPS = {"micro_batch_1", "dp4", "pp2_vpp2", "cp2_tp2", "tp2_pp2_ep2", "etp2_ep2"}


def steps(name: str, stage: str, sizes: dict) -> int:
    if stage != "stage1" or VARIATIONS & sizes.keys():
        return 2
    return 5 if name in FIVE_STEPS else 3


CASES = {
    f"{name}-{stage}": (
        world_size,
        Case(
            stage=stage,
            changes=sections(world_size, sizes),
            steps=steps(name, stage, sizes),
            experts=sizes.get("experts"),
        ),
    )
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
    "tp2_ep2_sharded_to_pp4": ("tp2_ep2_sharded", "pp4"),
    "tp2_pp2_to_dp4_sharded": ("tp2_pp2", "dp4_sharded"),
}
CASES |= {
    name: (
        4,
        Case(stage="stage1", changes=sections(4, LAYOUTS[4][saved]), resume_at=sections(4, LAYOUTS[4][read]), steps=3),
    )
    for name, (saved, read) in RESUMES.items()
}
# what loading depends on
LOADS = {
    world_size: {
        name: sections(world_size, sizes)
        for name, sizes in layouts.items()
        if not {*TRAIN, *OVERLAP, "experts"} & sizes.keys()
    }
    for world_size, layouts in LAYOUTS.items()
}


def layers(*layouts: Sections | None) -> int:
    """Four where there are as many chunks, or where it matters that a chunk of a pipeline has more than one."""
    for parallel, train in ((layout["parallel"], layout["train"]) for layout in layouts if layout):
        chunks = parallel.get("pipeline", 1) * parallel.get("virtual_pipeline", 1)
        if chunks > 2 or (chunks == 2 and ("frozen" in parallel or "recompute" in train)):
            return 4
    return 2


LAYERS = {name: layers(case.changes, case.resume_at) for name, (_, case) in CASES.items()}
LAYERS |= {name: layers(sizes) for loads in LOADS.values() for name, sizes in loads.items()}


@pytest.fixture(scope="module")
def comparisons(request, on_ranks, tmp_path_factory):
    """By number of layers."""
    root, names = tmp_path_factory.mktemp("layouts"), selected(request)
    names |= {name.replace(ours, theirs) for name in names for ours, theirs in REPLICATED.items()}
    found = {}
    for depth in (2, 4):
        base = write_toy_model(root / f"base_{depth}", num_hidden_layers=depth, tie_word_embeddings=True)
        cases = {name: case for name, (_, case) in CASES.items() if LAYERS[name] == depth}
        found[depth] = Comparison(base, root / f"runs_{depth}", cases)
    for world_size, layouts in LOADS.items():
        parts = []
        for depth, comparison in found.items():
            here = [name for name in comparison.cases if CASES[name][0] == world_size and name in names]
            loads = {name: sizes for name, sizes in layouts.items() if LAYERS[name] == depth and name in names}
            parts.append(Part(comparison=comparison, cases=here, loads=loads))
        if any(part.cases or part.loads for part in parts):
            run_parts(on_ranks, world_size, parts)
    return found


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_one_process(comparisons, name):
    comparisons[LAYERS[name]].check(name)


@pytest.mark.parametrize("name", [name for loads in LOADS.values() for name in loads])
def test_same_weights_as_one_process(comparisons, name):
    comparisons[LAYERS[name]].check_loaded(name)


@pytest.mark.parametrize("name", [f"{name}-{stage}" for name in REPLICATED for stage in ("stage1", "stage2")])
def test_sharded_weights_change_no_bit(comparisons, name):
    layout, stage = name.split("-")
    ours, theirs = (comparisons[2].outcomes[f"{one}-{stage}"] for one in (layout, REPLICATED[layout]))
    assert ours.metrics == theirs.metrics[: len(ours.metrics)]
    for key, gradient in theirs.gradients.items():
        np.testing.assert_array_equal(ours.gradients[key], gradient, err_msg=key)


@pytest.mark.parametrize("depth", [2, 4])
def test_the_steps_of_the_reference_differ(comparisons, depth):
    """Otherwise later steps would not show what the optimizer does."""
    for stage, expected in comparisons[depth].expected.items():
        losses = [step["lpr_loss" if stage == "stage2" else "ntp_loss"] for step in expected.metrics]
        assert abs(losses[0] - losses[1]) > 1e-4 * losses[0]
        if len(losses) == 5:
            assert abs(losses[0] - losses[-1]) > 5e-3 * losses[0]
