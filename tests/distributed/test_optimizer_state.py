"""The optimizer's state is what Megatron itself would write, and goes from layout to layout, number by number."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from harness import make_plan, make_recipe, mixed_batch
from tiny_models import save_tiny

from megatron_lpr.checkpoint import content, save
from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.platform import leave_layout
from megatron_lpr.platform.shims import cuda_type_names
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
# the second of two pipeline stages has a dense layer, and nothing that trains
NOTHING_TRAINS = {
    "model": {"num_experts": 5, "mlp_only_layers": [1]},
    "train": {"trainable": "new_experts_and_routers", "micro_batch_size": 1},
    "balance": {"coeff": 0.1},
}
STARTS = [("bfloat16", True), ("bfloat16", False), ("float32", True)]  # dtype, distributed optimizer
ROUTES = {"bfloat16": ROUTE, "float32": ROUTE[:2]}


@contextlib.contextmanager
def of_one_dtype() -> Iterator[None]:
    """Inside it routers have the model's dtype: with two of them Megatron's own form fails."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_lpr.model.lpr_router import LPRRouter

    with (
        patch.object(LPRRouter, "_apply", torch.nn.Module._apply),
        patch.object(LPRRouter, "gating", TopKRouter.gating),
    ):
        yield


@contextlib.contextmanager
def written_by_megatron(optimizer) -> Iterator[None]:
    """Inside it a save has this optimizer's state in Megatron's own form."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}

    def with_optimizer(chunks, held):
        state = content.model_state(chunks, held)
        with cuda_type_names():
            state["optimizer"] = optimizer.sharded_state_dict(state["model0"], is_loading=False, metadata=metadata)
        return state

    with patch.object(save, "model_state", with_optimizer), patch.object(save, "written_state", lambda *_: ([], [])):
        yield


def on_the_way(toy_base: Path, qwen: Path, root: Path) -> None:
    """On each rank: train a step, save in our form and in Megatron's; load ours and save it, layout after layout."""
    from megatron_lpr.platform import megatron

    def save(sections: dict, folder: Path, parallel: dict, resume: Path | None = None, *, twice: bool = False) -> Path:
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
        if twice:
            trainer.step += 1
            with written_by_megatron(trainer.optimizer):
                trainer.save()
        del trainer
        leave_layout()
        return saved

    with megatron():
        for dtype, distributed in STARTS:
            sections = ALL_TRAINS | {"model": ALL_TRAINS["model"] | {"dtype": dtype}}
            with of_one_dtype():
                save(sections, root / f"{dtype}{distributed}", {"distributed_optimizer": distributed}, twice=True)
        for dtype, route in ROUTES.items():
            sections = ALL_TRAINS | {"model": ALL_TRAINS["model"] | {"dtype": dtype}}
            at = save(sections, root / dtype, {})
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


def assert_same(run: Path, start: Path) -> None:
    ours, expected = checkpoint_tensors(run), checkpoint_tensors(start)
    assert ours.keys() == expected.keys()
    assert any(".exp_avg_sq." in key and expected[key].any() for key in expected)
    for key, tensor in expected.items():
        rows = min(len(tensor), len(ours[key]))  # of the vocabulary, which tensor parallelism pads
        assert torch.equal(ours[key][:rows], tensor[:rows]), key


@pytest.mark.parametrize("dtype", ROUTES)
def test_every_layout_reads_what_another_has_written(saved, dtype):
    start = saved / dtype
    for number in range(len(ROUTES[dtype])):
        assert_same(saved / f"{dtype}{number}", start)
    has_master = any("optimizer.state.param." in key for key in checkpoint_tensors(start))
    assert has_master == (dtype == "bfloat16")


@pytest.mark.parametrize("dtype, distributed", STARTS)
def test_each_number_is_where_megatron_itself_has_it(saved, dtype, distributed):
    ours, theirs = (checkpoint_tensors(saved / f"{dtype}{distributed}/checkpoints/step_0000000{n}") for n in (1, 2))
    prefix = re.compile(r"(chained_\d+\.)?optimizer\.state\.(fp32_)?")
    theirs = {prefix.sub("optimizer.state.", key): tensor for key, tensor in theirs.items()}
    assert all(".param." in key for key in theirs.keys() - ours.keys())  # a copy of what is fp32 in the model too
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def test_a_pipeline_stage_in_which_nothing_trains(saved):
    for number in (1, 2):
        assert_same(saved / f"stages{number}", saved / "stages0")
