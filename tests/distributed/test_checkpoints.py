"""A checkpoint does not know its layout: written at one it loads at any other, and the run goes on the same."""

import dataclasses
from pathlib import Path

import pytest
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.platform import leave_layout

STAGE1 = {
    "model": {"num_experts": 5},
    "train": {"trainable": "new_experts_and_routers", "micro_batch_size": 1},
    "balance": {"coeff": 0.1},
    "optimizer": {"lr": 1e-2, "clip_grad": 1.0},
}
STAGE2 = STAGE1 | {
    "train": {"trainable": "routers", "micro_batch_size": 1},
    "balance": {},
    "lpr": {"coeff": 0.1},
}
STAGES = {"stage1": STAGE1, "stage2": STAGE2}
LAYOUTS = {
    "data": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "expert": {"expert": 2},
    "sharded": {"frozen": "sharded"},
}
SAVED_STEP = 2


def plan_at(stage: str, layout: dict, base: Path, folder: Path, *, source: Path | None, resume: Path | None = None):
    """Stage 2 starts from a checkpoint of stage 1, on which its own ones lie."""
    from megatron_lpr.checkpoint.source import source_identity

    recipe = make_recipe(base, mixed_batch(), folder, STAGES[stage] | {"parallel": layout})
    plan = make_plan(recipe, mixed_batch(), source=source)
    if source:
        plan = dataclasses.replace(plan, origin=source_identity(source))
    return dataclasses.replace(plan, resume=resume, state=read_run_state(resume)) if resume else plan


def one_more_step(trainer) -> tuple[float, float]:
    metrics = trainer.train_step()
    return metrics["ntp_loss"], metrics["grad_norm"]


def write_and_read(base: Path, root: Path) -> dict:
    """On each rank: train, save and go on at every layout; then resume each of those checkpoints at two layouts."""
    from megatron_lpr.platform import megatron

    def train(stage: str, name: str, steps: int, *, resume: Path | None = None, save: bool = False):
        from megatron_lpr.training.train import Trainer

        source = checkpoint(root, "stage1", "pipeline") if stage == "stage2" else None
        trainer = Trainer(plan_at(stage, LAYOUTS[name], base, root / stage / name, source=source, resume=resume))
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
        uninterrupted = {
            (stage, name): train(stage, name, SAVED_STEP, save=True) for stage in STAGES for name in LAYOUTS
        }
        names = list(LAYOUTS)
        # each at its own layout and at the next; tests/distributed/test_layouts.py resumes others on four ranks
        pairs = [(saved, names[(i + j) % len(names)]) for i, saved in enumerate(names) for j in (0, 1)]
        resumed = {
            (stage, saved, loaded): train(stage, loaded, 0, resume=checkpoint(root, stage, saved))
            for stage in STAGES
            for saved, loaded in pairs
        }
    return {"uninterrupted": uninterrupted, "resumed": resumed}


def checkpoint(root: Path, stage: str, name: str) -> Path:
    return root / stage / name / f"checkpoints/step_{SAVED_STEP:08d}"


@pytest.fixture(scope="module")
def outcome(on_ranks, toy_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    results = on_ranks(write_and_read, 2, toy_base, root)
    assert results[0] == results[1], "metrics differ between ranks"
    return root, results[0]


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_go_on_at_other_layouts(outcome, stage):
    root, results = outcome
    expected = results["uninterrupted"][stage, "data"]
    for name in LAYOUTS:
        assert results["uninterrupted"][stage, name] == pytest.approx(expected, rel=1e-5), name
        content = read_run_state(checkpoint(root, stage, name)).content
        assert content == {"stage1": "over base", "stage2": "over checkpoint"}[stage]
    resumed = {names: step for names, step in results["resumed"].items() if names[0] == stage}
    assert len(resumed) == 2 * len(LAYOUTS)
    for names, step in resumed.items():
        assert step == pytest.approx(expected, rel=1e-5), names


@pytest.mark.parametrize("stage", STAGES)
def test_every_checkpoint_goes_on_in_one_process(outcome, megatron, toy_base, tmp_path, stage):
    from megatron.core import parallel_state

    from megatron_lpr.training.train import Trainer

    root, results = outcome
    source = checkpoint(root, "stage1", "pipeline") if stage == "stage2" else None
    for name in LAYOUTS:
        parallel_state.destroy_model_parallel()
        resume = checkpoint(root, stage, name)
        trainer = Trainer(plan_at(stage, {}, toy_base, tmp_path, source=source, resume=resume))
        for chunk in trainer.chunks:
            chunk.train()
        assert one_more_step(trainer) == pytest.approx(results["uninterrupted"][stage, "data"], rel=1e-5), name
