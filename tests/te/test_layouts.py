"""Transformer Engine's layers compute in every layout what the local ones compute in one process: losses, router
statistics, gradient norms, and every gradient, in fp32.

The local layers have the whole table (tests/distributed/test_layouts.py); here is each way of cutting a model once,
their combinations, and each stage where a cut treats its weights in a way of its own.
"""

import pytest
from layouts import Case, Comparison, Part, run_parts, selected

from megatron_lpr.testing.toy_models import write_toy_model

ALL = ("stage1", "stage2", "moe_full", "dense")
EXPERTS = ("stage1", "moe_full")
# by number of ranks: a layout, what is trained in it, and what else differs
LAYOUTS = {
    1: {
        "one": ({}, {}, ALL),
        "recompute_full": ({}, {"recompute": "full"}, ("stage1",)),
        "recompute_selective": ({}, {"recompute": "selective"}, ("stage1", "stage2")),
    },
    2: {
        "tp2": ({"tensor": 2}, {}, ALL),
        "ep2": ({"expert": 2}, {}, ("stage1", "stage2", "moe_full")),
        "etp2": ({"expert_tensor": 2}, {}, EXPERTS),
        "pp2": ({"pipeline": 2}, {}, ("stage2", "dense")),
        "tp2_recompute_full": ({"tensor": 2}, {"recompute": "full"}, EXPERTS),
        "tp2_recompute_selective": ({"tensor": 2}, {"recompute": "selective"}, ("stage1",)),
        "tp2_sharded": ({"tensor": 2, "frozen": "sharded"}, {}, ("stage1",)),
    },
    4: {
        "tp2_etp2_ep2": ({"tensor": 2, "expert_tensor": 2, "expert": 2}, {}, EXPERTS),
        "tp2_ep2_sharded": ({"tensor": 2, "expert": 2, "frozen": "sharded"}, {}, ("stage2",)),
        "ep2_allgather": ({"expert": 2, "dispatcher": "allgather"}, {}, ("stage1",)),
        "pp2_vpp2": ({"pipeline": 2, "virtual_pipeline": 2}, {"recompute": "full"}, ("stage1",)),
        "tp2_pp2_ep2": (
            {"tensor": 2, "pipeline": 2, "expert": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
            {},
            EXPERTS,
        ),
    },
}
CASES = {
    f"{name}-{stage}": (
        ranks,
        Case(stage=stage, changes={"model": {"spec": "te"}, "parallel": parallel, "train": train}),
    )
    for ranks, layouts in LAYOUTS.items()
    for name, (parallel, train, stages) in layouts.items()
    for stage in stages
}
LOCAL_PP2 = {"model": {"spec": "local"}, "parallel": {"pipeline": 2}}
TE_TP2_EP2 = {"model": {"spec": "te"}, "parallel": {"tensor": 2, "expert": 2}}
CASES |= {  # a checkpoint of one goes on as the other
    "local_pp2_to_te_tp2_ep2": (4, Case(stage="stage1", changes=LOCAL_PP2, resume_at=TE_TP2_EP2)),
    "te_tp2_ep2_to_local_pp2": (4, Case(stage="stage1", changes=TE_TP2_EP2, resume_at=LOCAL_PP2)),
}


@pytest.fixture(scope="module")
def comparison(request, on_ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    base = write_toy_model(root / "base", num_hidden_layers=4, tie_word_embeddings=True)
    found = Comparison(base, root / "runs", {name: case for name, (_, case) in CASES.items()})
    names = selected(request)
    for ranks in LAYOUTS:
        here = [name for name, (needed, _) in CASES.items() if needed == ranks and name in names]
        if here:
            run_parts(on_ranks, ranks, [Part(comparison=found, cases=here)])
    return found


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_one_process_without(comparison, name):
    comparison.check(name)
