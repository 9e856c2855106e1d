"""One training step in any layout: its losses, and its gradients put together from all ranks.

The pieces are found as a checkpoint finds them, by each parameter's sharded state, so that names, shapes and offsets
are global ones. Several ranks may hold the same piece: they must agree on it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    EXPANDED,
    ORIGINAL,
    OTHER_ORIGINAL,
    PADDING,
    make_batch,
    make_plan,
    make_recipe,
    scramble,
    unwrapped,
)

from megatron_lpr.testing.run_distributed import run_distributed
from megatron_lpr.training.run_state import read_run_state
from megatron_lpr.validation import check_recipe

Piece = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]  # global name, global shape, offset, values
STAGES = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.5}},
    "stage2": {
        "train": {"trainable": "routers"},
        "lpr": {"coeff": 0.5},
        "data": {"mixture": {"expanded": 0.5, "original": 0.5}},
    },
    "moe_full": {"train": {"trainable": "all"}, "balance": {"coeff": 0.5}},
    "dense": {"train": {"trainable": "all"}, "model": {"num_experts": 0}},
}
LOSSES = ("ntp_loss", "balance_loss", "lpr_loss", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage in a layout, and the layout in which it goes on from a checkpoint after the first step."""

    stage: str
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # sections of the recipe
    resume_at: Mapping[str, Mapping[str, Any]] | None = None


def unfair_batch(length: int = 16):
    """Eight sequences: most without an original token, one with a single one, three padded."""
    return make_batch(
        [
            [(EXPANDED, length)],
            [(EXPANDED, 7), (ORIGINAL, 1), (EXPANDED, length - 8)],
            [(ORIGINAL, 3), (PADDING, length - 3)],
            [(EXPANDED, length)],
            [(EXPANDED, 9), (PADDING, length - 9)],
            [(OTHER_ORIGINAL, length)],
            [(EXPANDED, length)],
            [(EXPANDED, 5), (ORIGINAL, 4), (PADDING, length - 9)],
        ]
    )


def recipe_of(base: Path, stage: str, output: Path, changes: Mapping[str, Mapping[str, Any]]):
    """A stage with one frozen and four new experts, micro-batches of one sample, and `changes` on top."""
    common = {
        "model": {"num_experts": 5},
        "train": {"micro_batch_size": 1},
        # far above rounding: Adam would make a whole step of the noise in a gradient that is next to nothing
        "optimizer": {"lr": 1e-2, "clip_grad": 1e9, "eps": 1e-3},
        "checkpoint": {"final_optimizer": False, "keep": 0},
    }
    sections: dict[str, dict[str, Any]] = {}
    for layer in (common, STAGES[stage], changes):
        for name, section in layer.items():
            sections[name] = sections.get(name, {}) | dict(section)
    return make_recipe(base, unfair_batch(), output, sections)


def trainer_of(base: Path, stage: str, output: Path, changes=None, *, source=None, resume=None, world_size: int = 1):
    """A trainer ready to make a step: fresh, with weights from the checkpoint `source`, or resuming from `resume`."""
    from megatron_lpr.training.train import Trainer

    recipe = recipe_of(base, stage, output, changes or {})
    plan = make_plan(recipe, unfair_batch(), world_size=world_size, source=None if stage == "dense" else source)
    check_recipe(recipe, plan.arch, world_size)
    if resume is not None:
        plan = dataclasses.replace(plan, resume=resume, state=read_run_state(resume))
    trainer = Trainer(plan)
    for chunk in trainer.chunks:
        chunk.train()
    return trainer


def two_steps(base: Path, case: Case, source: Path, output: Path, *, world_size: int = 1):
    """The metrics of two steps, and this rank's pieces of the second step's gradients."""
    from megatron_lpr.platform import leave_layout

    trainer = trainer_of(base, case.stage, output, case.changes, source=source, world_size=world_size)
    metrics = [trainer.train_step()]
    if case.resume_at is not None:
        trainer.save(last=False)
        del trainer
        leave_layout()
        resume = output / "checkpoints/step_00000001"
        trainer = trainer_of(base, case.stage, output, case.resume_at, resume=resume, world_size=world_size)
    metrics.append(trainer.train_step())
    found = [{name: step[name] for name in LOSSES} for step in metrics], pieces(trainer)
    del trainer
    leave_layout()
    return found


def pieces(trainer) -> list[Piece]:
    """This rank's pieces of the gradients of all trainable parameters."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

    found = []
    for chunk in trainer.chunks:
        _gather_over_data_parallel(chunk)
        gradients = {p.data_ptr(): p.main_grad for p in chunk.module.parameters() if p.requires_grad}
        state = chunk.module.sharded_state_dict()
        kept = {}
        for name, entry in state.items():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data.data_ptr() in gradients:
                entry.data = gradients.pop(entry.data.data_ptr())
                kept[name] = entry
        assert not gradients, "trainable parameters without a sharded state"
        apply_factories(kept)
        for part in nested_values(kept):
            # values of a piece may have fewer dimensions: the leading ones are layers or experts
            found.append((part.key, part.global_shape, part.global_offset, part.data.clone().numpy()))
    return found


def _gather_over_data_parallel(chunk) -> None:
    """The distributed optimizer leaves each rank with its shard of the summed gradients."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        for bucket in buffer.buckets:
            size, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
            shard = bucket.grad_data.chunk(size)[rank].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=buffer.data_parallel_group)


def assemble(by_rank: list[list[Piece]]) -> dict[str, np.ndarray]:
    """Whole gradients from the pieces of all ranks."""
    whole: dict[str, np.ndarray] = {}
    for key, shape, offset, values in (piece for rank in by_rank for piece in rank):
        tensor = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float64))
        values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
        place = tensor[tuple(slice(at, at + n) for at, n in zip(offset, values.shape, strict=True))]
        if not np.isnan(place).all():
            np.testing.assert_allclose(values, place, rtol=0, atol=1e-6 * np.abs(place).max(), err_msg=key)
        place[...] = values
    for key, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"{key}: parts of the gradient are nowhere"
    return whole


def assert_same(got, expected, case: str) -> None:
    """(metrics of each step, gradients) equal to fp32 rounding."""
    for step, (mine, theirs) in enumerate(zip(got[0], expected[0], strict=True)):
        for name in LOSSES:
            if theirs[name] is None:
                assert mine[name] is None, (case, step, name)
            else:
                assert abs(mine[name] - theirs[name]) <= 1e-5 * abs(theirs[name]), (case, step, name, mine, theirs)
    assert got[1].keys() == expected[1].keys(), case
    for key, gradient in expected[1].items():
        size = np.abs(gradient).max()
        assert size > 0, key
        np.testing.assert_allclose(got[1][key], gradient, rtol=0, atol=1e-5 * size, err_msg=f"{case}: {key}")


def run_cases(base: Path, source: Path, world_size: int, cases: list[Case]) -> list:
    """On one rank of a distributed run: `two_steps` of every case."""
    from megatron_lpr.platform import megatron

    with megatron():
        return [
            two_steps(base, case, source, source / f"case_{index}", world_size=world_size)
            for index, case in enumerate(cases)
        ]


def compare_layouts(base: Path, folder: Path, world_size: int, cases: dict[str, Case]) -> tuple[dict, dict]:
    """Results of every case on `world_size` ranks, and by stage what one process computes. One launch."""
    from megatron_lpr.platform import leave_layout, megatron

    expected = {}
    with megatron():
        source = write_source(base, folder)
        leave_layout()
        for stage in {case.stage for case in cases.values()}:
            metrics, found = two_steps(base, Case(stage=stage), source, folder)
            expected[stage] = metrics, assemble([found])
    by_rank = run_distributed(run_cases, world_size, base, source, world_size, list(cases.values()))
    results = {}
    for name, ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        assert all(metrics == ranks[0][0] for metrics, _ in ranks), f"{name}: metrics differ between ranks"
        results[name] = ranks[0][0], assemble([found for _, found in ranks])
    return results, expected


def write_source(base: Path, output: Path) -> Path:
    """A checkpoint in which every expert has weights of its own."""
    trainer = trainer_of(base, "moe_full", output)
    scramble(unwrapped(trainer))
    trainer.save(last=True)
    return output / "checkpoints/step_00000000"
