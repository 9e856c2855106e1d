"""A checkpoint does not know its layout: written at one it loads at any other, and the run goes on the same."""

import dataclasses
from pathlib import Path

import pytest
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.platform import leave_layout

STAGE1 = {
    "model": {"num_experts": 5},
    "train": {"trainable": "new_experts_and_routers", "micro_batch_size": 1},
    "balance": {"coeff": 0.1},
    "optimizer": {"lr": 1e-2, "clip_grad": 1.0},
}
LAYOUTS = {
    "data": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "expert": {"expert": 2},
}
SAVED_STEP = 2


def plan_at(layout: dict, base: Path, folder: Path, resume: Path | None = None):
    from megatron_lpr.checkpoint.run_state import read_run_state

    recipe = make_recipe(base, mixed_batch(), folder, STAGE1 | {"parallel": layout})
    plan = make_plan(recipe, mixed_batch())
    return dataclasses.replace(plan, resume=resume, state=read_run_state(resume)) if resume else plan


def one_more_step(trainer) -> tuple[float, float]:
    metrics = trainer.train_step()
    return metrics["ntp_loss"], metrics["grad_norm"]


def write_and_read(base: Path, root: Path) -> dict:
    """On each rank: train, save and go on at every layout; then resume each of those checkpoints at two layouts."""
    from megatron_lpr.platform import megatron

    def train(name: str, steps: int, *, resume: Path | None = None, save: bool = False):
        from megatron_lpr.training.train import Trainer

        trainer = Trainer(plan_at(LAYOUTS[name], base, root / name, resume))
        for chunk in trainer.chunks:
            chunk.train()
        for _ in range(steps):
            trainer.train_step()
        if save:
            trainer.save()
        result = one_more_step(trainer)
        del trainer
        leave_layout()
        return result

    with megatron():
        uninterrupted = {name: train(name, SAVED_STEP, save=True) for name in LAYOUTS}
        names = list(LAYOUTS)
        # each at its own layout and at the next; tests/distributed/test_layouts.py resumes others on four ranks
        pairs = [(saved, names[(i + j) % len(names)]) for i, saved in enumerate(names) for j in (0, 1)]
        resumed = {(saved, loaded): train(loaded, 0, resume=checkpoint(root, saved)) for saved, loaded in pairs}
    return {"uninterrupted": uninterrupted, "resumed": resumed}


def checkpoint(root: Path, name: str) -> Path:
    return root / name / f"checkpoints/step_{SAVED_STEP:08d}"


@pytest.fixture(scope="module")
def outcome(on_ranks, toy_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    results = on_ranks(write_and_read, 2, toy_base, root)
    assert results[0] == results[1], "metrics differ between ranks"
    return root, results[0]


def test_checkpoints_go_on_at_other_layouts(outcome):
    _, results = outcome
    expected = results["uninterrupted"]["data"]
    for name, step in results["uninterrupted"].items():
        assert step == pytest.approx(expected, rel=1e-5), name
    for pair, step in results["resumed"].items():
        assert step == pytest.approx(expected, rel=1e-5), pair


def test_every_checkpoint_goes_on_in_one_process(outcome, megatron, toy_base, tmp_path):
    from megatron.core import parallel_state

    from megatron_lpr.training.train import Trainer

    root, results = outcome
    for name in LAYOUTS:
        parallel_state.destroy_model_parallel()
        trainer = Trainer(plan_at({}, toy_base, tmp_path, resume=checkpoint(root, name)))
        for chunk in trainer.chunks:
            chunk.train()
        assert one_more_step(trainer) == pytest.approx(results["uninterrupted"]["data"], rel=1e-5), name
