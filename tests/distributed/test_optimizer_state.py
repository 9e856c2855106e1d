"""The optimizer's state goes from layout to layout, number by number; so does that of an older version."""

import dataclasses
from pathlib import Path

import pytest
import torch
from harness import make_plan, make_recipe, mixed_batch
from old_checkpoints import routers_as_before, written_as_before
from tiny_models import save_tiny

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.platform import leave_layout
from megatron_lpr.testing.equal_runs import checkpoint_tensors

ROUTE = [
    {"tensor": 2},
    {"pipeline": 2, "distributed_optimizer": False},
    {"distributed_optimizer": False},
    {"expert": 2},
    {"tensor": 2, "expert_tensor": 2, "distributed_optimizer": False},
    {"context": 2},
]
ALL_TRAINS = {"model": {"num_experts": 5}, "train": {"trainable": "all", "micro_batch_size": 1}}
ROUTER = "mlp.router.weight"
# the second of two pipeline stages has a dense layer, and nothing that trains
NOTHING_TRAINS = {
    "model": {"num_experts": 5, "mlp_only_layers": [1]},
    "train": {"trainable": "new_experts_and_routers", "micro_batch_size": 1},
    "balance": {"coeff": 0.1},
}
OLD = [("bfloat16", True), ("bfloat16", False), ("float32", True)]  # dtype, distributed optimizer
ROUTES = {"bfloat16": ROUTE, "float32": ROUTE[:2]}


def on_the_way(toy_base: Path, qwen: Path, root: Path) -> None:
    """On each rank: train a step, save in the old form and the new one; load that and save it, layout after layout."""
    from megatron_lpr.platform import megatron

    def save(sections: dict, folder: Path, parallel: dict, resume: Path | None = None, *, old: bool = False) -> Path:
        from megatron_lpr.training.train import Trainer

        base = qwen if sections is NOTHING_TRAINS else toy_base
        recipe = make_recipe(base, mixed_batch(), folder, sections | {"parallel": parallel})
        plan = make_plan(recipe, mixed_batch(), world_size=2)
        if resume:
            trainer = Trainer(dataclasses.replace(plan, resume=resume, state=read_run_state(resume)))
        else:
            trainer = Trainer(plan)
            trainer.train_step()
        saved = trainer.save()
        if old:
            trainer.step += 1
            with written_as_before(trainer.optimizer):
                saved = trainer.save()
        del trainer
        leave_layout()
        return saved

    with megatron():
        for dtype, distributed in OLD:
            sections = ALL_TRAINS | {"model": ALL_TRAINS["model"] | {"dtype": dtype}}
            folder = root / f"{dtype}{distributed}"
            with routers_as_before():
                old = save(sections, folder / "first", {"distributed_optimizer": distributed}, old=True)
            save(sections, folder / "old", {"tensor": 2}, old)
        for dtype, route in ROUTES.items():
            sections = ALL_TRAINS | {"model": ALL_TRAINS["model"] | {"dtype": dtype}}
            at = root / f"{dtype}True/first/checkpoints/step_00000001"
            for number, parallel in enumerate(route):
                at = save(sections, root / f"{dtype}{number}", parallel, at)
        at = None
        for number, parallel in enumerate(({"pipeline": 2}, {}, {"pipeline": 2})):
            at = save(NOTHING_TRAINS, root / f"stages{number}", parallel, at)


@pytest.fixture(scope="module")
def saved(on_ranks, toy_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("optimizer")
    # a family that may have dense layers between those with experts
    qwen = save_tiny("qwen3", root / "qwen", num_hidden_layers=2, vocab_size=257)
    on_ranks(on_the_way, 2, toy_base, qwen, root)
    return root


def with_masters_of_routers(tensors: dict) -> dict:
    """A checkpoint with routers in bfloat16 as one of today, which has them in fp32 and no copy in the optimizer."""
    masters = {name: name.removeprefix("optimizer.state.param.") for name in tensors if name.endswith(ROUTER)}
    masters = {name: weight for name, weight in masters.items() if name != weight}
    for master, weight in masters.items():
        assert tensors[weight].dtype == torch.bfloat16 and not torch.equal(tensors[weight].float(), tensors[master])
    return {masters.get(name, name): tensor for name, tensor in tensors.items() if name not in masters.values()}


def assert_same(run: Path, start: Path) -> None:
    ours, expected = checkpoint_tensors(run), with_masters_of_routers(checkpoint_tensors(start))
    assert ours.keys() == expected.keys()
    assert any(".exp_avg_sq." in key and expected[key].any() for key in expected)
    for key, tensor in expected.items():
        rows = min(len(tensor), len(ours[key]))  # of the vocabulary, which tensor parallelism pads
        assert torch.equal(ours[key][:rows], tensor[:rows]), key


@pytest.mark.parametrize("dtype", ROUTES)
def test_every_layout_reads_what_another_has_written(saved, dtype):
    start = saved / f"{dtype}True/first/checkpoints/step_00000001"
    for number in range(len(ROUTES[dtype])):
        assert_same(saved / f"{dtype}{number}", start)
    has_master = any("optimizer.state.param." in key for key in checkpoint_tensors(start))
    assert has_master == (dtype == "bfloat16")


@pytest.mark.parametrize("dtype, distributed", OLD)
def test_the_form_of_older_versions_loads(saved, dtype, distributed):
    folder = saved / f"{dtype}{distributed}"
    assert any("chained_0." in key for key in checkpoint_tensors(folder / "first"))
    assert_same(folder / "old", folder / "first/checkpoints/step_00000001")


def test_a_pipeline_stage_in_which_nothing_trains(saved):
    for number in (1, 2):
        assert_same(saved / f"stages{number}", saved / "stages0")
