"""Packed documents that do not see each other, over context-parallel ranks and pipeline stages: the same numbers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from harness import make_plan, make_recipe, mixed_batch, scramble, unwrapped

from megatron_lpr.platform import leave_layout, megatron
from megatron_lpr.recipe.settings import CheckpointConfig

LAYOUTS = {
    "cp2": {"context": 2},
    "pp2": {"pipeline": 2},
    "tp2": {"tensor": 2},
}
LOSSES = ("ntp_loss", "lpr_loss", "grad_norm")


def packed_batch():
    """mixed_batch() with a document border wherever the language changes, and one inside the first sequence."""
    batch = mixed_batch()
    borders = np.diff(batch.tags_BS, axis=1, prepend=batch.tags_BS[:, :1]) != 0
    borders[0, 7] = True
    return dataclasses.replace(batch, documents_BS=np.cumsum(borders, axis=1).astype(np.int32))


def trainer_of(base: Path, output: Path, parallel: dict, *, source=None, batch=None, recompute: str = "none"):
    from megatron_lpr.training.train import Trainer

    batch = packed_batch() if batch is None else batch
    sections = {
        "train": {"trainable": "all", "micro_batch_size": 2, "recompute": recompute},
        "lpr": {"coeff": 0.5},
        "data": {"reset_attention": True},
        "parallel": parallel,
    }
    recipe = make_recipe(base, batch, output, sections)
    recipe = dataclasses.replace(recipe, checkpoint=CheckpointConfig(final_optimizer=False))
    trainer = Trainer(make_plan(recipe, batch, source=source, world_size=2 if parallel else 1))
    for chunk in trainer.chunks:
        chunk.train()
    return trainer


def one_step(base: Path, source: Path, parallel: dict, **settings) -> dict[str, float]:
    metrics = trainer_of(base, source / "unused", parallel, source=source, **settings).train_step()
    leave_layout()
    return {name: metrics[name] for name in LOSSES}


def run_layouts(base: Path, source: Path) -> list[dict[str, float]]:
    """On one rank of two."""
    with megatron():
        return [one_step(base, source, parallel) for parallel in LAYOUTS.values()]


@pytest.fixture(scope="module")
def runs(on_ranks, toy_base, tmp_path_factory):
    output = tmp_path_factory.mktemp("source")
    with megatron():
        trainer = trainer_of(toy_base, output, {})
        scramble(unwrapped(trainer))
        trainer.save(with_optimizer=False)
        source = output / "checkpoints/step_00000000"
        leave_layout()
        expected = one_step(toy_base, source, {})
        recomputed = one_step(toy_base, source, {}, recompute="full")
        seen_through = one_step(toy_base, source, {}, batch=mixed_batch())
    ranks = on_ranks(run_layouts, 2, toy_base, source)
    return expected, recomputed, seen_through, [dict(zip(LAYOUTS, rank, strict=True)) for rank in ranks]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_process(runs, layout):
    expected, _, seen_through, ranks = runs
    for rank in ranks:
        assert rank[layout] == pytest.approx(expected, rel=1e-5)
    assert abs(seen_through["ntp_loss"] - expected["ntp_loss"]) > 1e-3


def test_recomputation_sees_the_same_documents(runs):
    expected, recomputed, *_ = runs
    assert recomputed == pytest.approx(expected, rel=1e-6)
