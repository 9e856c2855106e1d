"""Pipelines (interleaved, uneven), recomputation, the loss in chunks, overlap and their checkpoints: gradients equal
one process's."""

import pytest
from layouts import Case, Comparison, Part, run_parts, selected, trainer_of, unfair_batch

from megatron_lpr.testing.toy_models import write_toy_model

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 3}
UNEVEN_INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 4}

# six layers on four ranks; what pipeline and tensor parallelism leave is data parallelism
CASES = {
    "interleaved": Case(stage="stage1", changes={"parallel": INTERLEAVED}),
    "interleaved_uneven_overlap_full": Case(
        stage="stage1", changes={"parallel": UNEVEN_INTERLEAVED | OVERLAP, "train": FULL}
    ),
    "interleaved_uneven_selective": Case(stage="stage2", changes={"parallel": UNEVEN_INTERLEAVED, "train": SELECTIVE}),
    "uneven_first_and_last": Case(
        stage="stage2",
        changes={"parallel": {"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1}, "train": FULL},
        chunk_bytes=5000,
    ),
    "uneven_first_tensor": Case(
        stage="stage1",
        changes={"parallel": {"pipeline": 2, "tensor": 2, "first_stage_layers": 2}, "train": SELECTIVE},
        chunk_bytes=5000,
    ),
    "uneven_last": Case(stage="stage1", changes={"parallel": {"pipeline": 2, "last_stage_layers": 1}, "train": FULL}),
    "overlap_whole_optimizer": Case(
        stage="stage2", changes={"parallel": {"overlap_grad_reduce": True, "distributed_optimizer": False}}
    ),
    "moe_full": Case(stage="moe_full", changes={"parallel": INTERLEAVED | OVERLAP, "train": FULL}),
    "dense": Case(
        stage="dense", changes={"parallel": {"pipeline": 2, "tensor": 2}, "train": SELECTIVE}, chunk_bytes=5000
    ),
    "save_interleaved_resume_flat": Case(
        stage="stage1",
        changes={"parallel": INTERLEAVED | OVERLAP},
        resume_at={"parallel": {"pipeline": 2, "first_stage_layers": 4}},
    ),
    "save_overlapped_resume_interleaved": Case(
        stage="stage1", changes={"parallel": OVERLAP}, resume_at={"parallel": UNEVEN_INTERLEAVED}
    ),
    "save_expert_resume_interleaved": Case(
        stage="stage1", changes={"parallel": {"expert": 2}}, resume_at={"parallel": INTERLEAVED}
    ),
}


@pytest.fixture(scope="module")
def comparison(request, on_ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    base = write_toy_model(root / "base", num_hidden_layers=6)
    comparison = Comparison(base, root / "runs", CASES)
    run_parts(on_ranks, 4, [Part(comparison=comparison, cases=[name for name in CASES if name in selected(request)])])
    return comparison


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_one_process(comparison, name):
    comparison.check(name)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_router_statistics_count_every_token_once(megatron, toy_base, tmp_path, monkeypatch, recompute):
    from megatron_lpr.model.router_stats import TOKENS
    from megatron_lpr.training.step_metrics import StatsOfStep

    trainer = trainer_of(toy_base, "stage1", tmp_path, {"train": {"recompute": recompute}})
    reduced, read = [], StatsOfStep.read
    monkeypatch.setattr(StatsOfStep, "read", lambda stats: reduced.append(read(stats)) or reduced[-1])
    trainer.train_step()
    tokens = int((unfair_batch().tags_BS != 0).sum())
    assert reduced[0].sums_NLC[:, :, TOKENS].sum(1).tolist() == [tokens, tokens]
