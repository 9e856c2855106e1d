"""Trainers of one and of several ranks on the same global batch, started from the same checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

from harness import make_plan, make_recipe, mixed_batch, scramble, unwrapped

from megatron_lpr.config import CheckpointConfig
from megatron_lpr.platform import leave_layout

STAGES = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.5}},
    "stage2": {"train": {"trainable": "routers"}, "lpr": {"coeff": 0.5}},
    "all": {"train": {"trainable": "all"}, "balance": {"coeff": 0.3}, "lpr": {"coeff": 0.5}},
}
LOSSES = ("ntp_loss", "balance_loss", "lpr_loss", "grad_norm")


def recipe_of(base: Path, stage: str, output: Path, **parallel: Any):
    """One frozen and four new experts; two micro-batches or more on every rank."""
    sections = {name: dict(section) for name, section in STAGES[stage].items()}
    sections["train"]["micro_batch_size"] = 1
    sections |= {"model": {"num_experts": 5}, "optimizer": {"lr": 1e-3, "clip_grad": 1e9}, "parallel": parallel}
    return make_recipe(base, mixed_batch(), output, sections)


def write_source(base: Path, output: Path) -> Path:
    """A checkpoint in which every expert has weights of its own."""
    from megatron_lpr.training.train import Trainer

    recipe = recipe_of(base, "all", output)
    recipe = dataclasses.replace(recipe, checkpoint=CheckpointConfig(final_optimizer=False))
    trainer = Trainer(make_plan(recipe, mixed_batch()))
    scramble(unwrapped(trainer))
    trainer.save(last=True)
    return output / "checkpoints/step_00000000"


def two_steps(base: Path, stage: str, source: Path, world_size: int, **parallel: Any) -> list[dict[str, Any]]:
    """Metrics of two steps in the layout `parallel`; the second one sees what the optimizer did."""
    from megatron_lpr.training.train import Trainer

    recipe = recipe_of(base, stage, source / "unused", **parallel)
    trainer = Trainer(make_plan(recipe, mixed_batch(), world_size=world_size, source=source))
    for chunk in trainer.chunks:
        chunk.train()
    return [{name: metrics[name] for name in LOSSES} for metrics in (trainer.train_step(), trainer.train_step())]


def run_layouts(base: Path, source: Path, world_size: int, cases: list[tuple[str, dict[str, int]]]) -> list:
    """On one rank of a distributed run: `two_steps` of every (stage, parallel sizes), or what went wrong."""
    from megatron_lpr.platform import megatron

    results = []
    with megatron():
        for stage, parallel in cases:
            results.append(two_steps(base, stage, source, world_size, **parallel))
            leave_layout()
    return results
