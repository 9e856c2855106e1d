"""Sequences split over ranks, without Transformer Engine: losses and gradients of one process.

Of two ranks the first has positions 0-3 and 12-15 of 16, the second those between: in `unfair_batch` either has
sequences without an original token of which the other has some, and sequences that are nothing but padding.
"""

from pathlib import Path

import numpy as np
import pytest
from full_gradients import LOSSES, assemble, assert_same, pieces, trainer_of, write_source

from megatron_lpr.platform import leave_layout, megatron
from megatron_lpr.testing.run_distributed import run_distributed

TWO_SAMPLES = {"train": {"micro_batch_size": 2}}
LAYOUTS = {
    "cp2_dp2": {"parallel": {"context": 2}, **TWO_SAMPLES},
    "cp4": {"parallel": {"context": 4}, **TWO_SAMPLES},
    "cp2_tp2": {"parallel": {"context": 2, "tensor": 2}, **TWO_SAMPLES},
    "cp2_pp2": {"parallel": {"context": 2, "pipeline": 2}, **TWO_SAMPLES},
    "cp2_ep2": {"parallel": {"context": 2, "expert": 2}, **TWO_SAMPLES},
    "cp2_ep4_recompute": {
        "parallel": {"context": 2, "expert": 4, "overlap_grad_reduce": True, "overlap_param_gather": True},
        "train": {"micro_batch_size": 2, "recompute": "full"},
    },
}
CASES = [(layout, stage) for layout in LAYOUTS for stage in ("stage1", "stage2")]
CASES += [("cp2_tp2", "moe_full"), ("cp4", "dense")]
VOCABULARY = 257


def two_steps(base: Path, stage: str, source: Path, changes: dict, world_size: int):
    """The metrics of two steps, and this rank's pieces of the first step's gradients.

    The second step shows that every rank updated alike. Its gradients are no measure: Adam makes an update of full size
    from a gradient that is nothing but rounding.
    """
    trainer = trainer_of(base, stage, source / "unused", changes, source=source, world_size=world_size)
    first, parts, second = trainer.train_step(), pieces(trainer), trainer.train_step()
    return [{name: step[name] for name in LOSSES} for step in (first, second)], parts


def run_cases(base: Path, source: Path, cases: list[tuple[str, dict]], world_size: int) -> list:
    """On one rank of a distributed run."""
    results = []
    with megatron():
        for stage, changes in cases:
            results.append(two_steps(base, stage, source, changes, world_size))
            leave_layout()
    return results


def whole_gradients(by_rank: list) -> dict[str, np.ndarray]:
    """Of all parameters; without the rows that pad the vocabulary, whose number depends on the tensor-parallel size."""
    gradients = assemble(by_rank)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in gradients:
            gradients[name] = gradients[name][:VOCABULARY]
    return gradients


@pytest.fixture(scope="module")
def runs(toy_base, tmp_path_factory):
    """Metrics and whole gradients by (layout, stage), and of one process by stage."""
    with megatron():
        source = write_source(toy_base, tmp_path_factory.mktemp("source"))
        expected = {}
        for stage in {stage for _, stage in CASES}:
            metrics, parts = two_steps(toy_base, stage, source, {}, 1)
            expected[stage] = metrics, whole_gradients([parts])
    cases = [(stage, LAYOUTS[name]) for name, stage in CASES]
    by_rank = run_distributed(run_cases, 4, toy_base, source, cases, 4)
    results = {}
    for case, outcomes in zip(CASES, zip(*by_rank, strict=True), strict=True):
        metrics = [metrics for metrics, _ in outcomes]
        assert all(step == metrics[0] for step in metrics), f"{case}: metrics differ between ranks"
        results[case] = metrics[0], whole_gradients([parts for _, parts in outcomes])
    return results, expected


@pytest.mark.parametrize("layout, stage", CASES)
def test_split_sequences_give_the_same_numbers(runs, layout, stage):
    results, expected = runs
    assert_same(results[layout, stage], expected[stage], f"{layout} {stage}")
