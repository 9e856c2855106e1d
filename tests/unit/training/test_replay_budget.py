"""The replay budget: counted over the whole run, against stage 1's tokens, refused above its limit."""

import dataclasses

import pytest
from harness import FixedSampler, make_recipe, mixed_batch

from megatron_lpr.checkpoint.run_state import RunState, write_run_state
from megatron_lpr.errors import UserError
from megatron_lpr.training.replay_budget import ReplayBudget, replay_budget


@pytest.fixture
def budget_of(toy_base, tmp_path):
    """mixed_batch() has 44 tokens, 23 of them original; a run reads it in every one of its ten steps."""

    def make(source=None, **replay) -> ReplayBudget | None:
        batch = mixed_batch()
        recipe = make_recipe(toy_base, batch, tmp_path, {"data": {"replay": replay}})
        batch = dataclasses.replace(
            batch, **{name: array.repeat(10, 0) for name, array in vars(batch).items() if array is not None}
        )
        return replay_budget(recipe, FixedSampler(batch), source)

    return make


def stage1(folder, **tokens: int):
    write_run_state(
        folder, RunState(step=1, consumed_samples=4, has_optimizer=True, recipe={}, tokens_per_language=tokens)
    )
    return folder


def test_counts_the_whole_run_against_stage_1(budget_of, tmp_path):
    budget = budget_of(stage1(tmp_path, qaa=40_000, qab=6_000))
    assert (budget.replayed, budget.stage1) == (230, 46_000)
    budget.check()
    assert str(budget) == "230 tokens of original languages, 0.50% of stage 1's 46,000 (limit 1.00%)"


def test_refuses_more_than_the_limit_unless_allowed(budget_of, tmp_path):
    source = stage1(tmp_path, qaa=22_999)
    with pytest.raises(UserError, match="reads 230 tokens of original languages, 1.00% of stage 1's 22,999, above"):
        budget_of(source).check()
    budget_of(source, max_share=0.02).check()
    budget_of(source, stage1_tokens=23_000).check()
    with pytest.raises(UserError, match="data.replay.max_share"):
        budget_of(None, stage1_tokens=100).check()


def test_without_a_stage_1_there_is_no_limit(budget_of, tmp_path):
    for source in (None, stage1(tmp_path)):
        budget = budget_of(source)
        budget.check()
        assert "stage 1 not known" in str(budget)
