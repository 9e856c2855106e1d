"""Expert parallelism, tensor parallelism inside experts and the dispatchers: gradients equal one process's."""

import pytest
from full_gradients import Case, assert_same, compare_layouts

# four new experts on four ranks; what a layout leaves is data parallelism
LAYOUTS = {
    "as_many_ranks_as_new_experts": ({"expert": 4}, ("stage1", "stage2")),
    "as_many_ranks_allgather": ({"expert": 4, "dispatcher": "allgather"}, ("stage1",)),
    "tensor_ep4": ({"tensor": 2, "expert": 4}, ("moe_full",)),
    "etp2": ({"expert_tensor": 2}, ("stage1",)),
    "etp2_allgather": ({"expert_tensor": 2, "dispatcher": "allgather"}, ("stage1",)),
    "etp4": ({"expert_tensor": 4}, ("stage2",)),
    "etp2_ep2": ({"expert_tensor": 2, "expert": 2}, ("stage1", "stage2")),
    "etp2_ep2_allgather": ({"expert_tensor": 2, "expert": 2, "dispatcher": "allgather"}, ("stage1",)),
    "tp2_etp2_ep2": ({"tensor": 2, "expert_tensor": 2, "expert": 2}, ("stage1", "moe_full")),
    "tp2_etp2": ({"tensor": 2, "expert_tensor": 2, "distributed_optimizer": False}, ("stage1",)),
    "pp2_etp2": ({"pipeline": 2, "expert_tensor": 2}, ("stage1",)),
    "ep2_overlap": ({"expert": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}, ("stage1",)),
}
CASES = {
    f"{name}-{stage}": Case(stage=stage, changes={"parallel": parallel})
    for name, (parallel, stages) in LAYOUTS.items()
    for stage in stages
}


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory):
    return compare_layouts(toy_base, tmp_path_factory.mktemp("experts"), 4, CASES)


@pytest.mark.parametrize("name", CASES)
def test_same_losses_and_gradients_as_one_process(runs, name):
    results, expected = runs
    assert_same(results[name], expected[CASES[name].stage], name)
