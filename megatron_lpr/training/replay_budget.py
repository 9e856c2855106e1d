"""How much of the original languages a run replays, against the tokens of stage 1."""

from dataclasses import dataclass
from pathlib import Path

from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class ReplayBudget:
    """Original-language tokens (positions with a label) of the whole run, and the tokens of stage 1."""

    replayed: int
    stage1: int | None  # not known: the run does not start from a trained checkpoint
    limit: float

    def check(self) -> None:
        """Raises UserError above the limit (the paper replays under 1% of stage 1, arXiv 2408.11396)."""
        if self.stage1 and self.replayed > self.limit * self.stage1:
            raise UserError(
                f"data.replay.max_share: the run reads {self.replayed:,} tokens of original languages, "
                f"{self.replayed / self.stage1:.2%} of stage 1's {self.stage1:,}, above the limit of {self.limit:.2%}; "
                "read fewer (train.steps, data.mixture), or raise data.replay.max_share"
            )

    def __str__(self) -> str:
        share = "stage 1 not known (data.replay.stage1_tokens)"
        if self.stage1:
            share = f"{self.replayed / self.stage1:.2%} of stage 1's {self.stage1:,} (limit {self.limit:.2%})"
        return f"{self.replayed:,} tokens of original languages, {share}"


def replay_budget(
    recipe: Recipe, sampler: ReplaySampler, source: Path | None, stage1_tokens: int | None = None
) -> ReplayBudget | None:
    """The budget of a run from its first step to its last; None where it replays nothing.

    Args:
        source: the checkpoint of stage 1 that the weights come from.
        stage1_tokens: what a resumed run remembers of it; the checkpoint need not be there any more.
    """
    samples = recipe.train.steps * recipe.train.global_batch_size
    replayed = sampler.count(0, samples).original_tokens
    if not replayed:
        return None
    stage1 = recipe.data.replay.stage1_tokens
    if stage1 is None:
        stage1 = stage1_tokens
    if stage1 is None and source is not None:
        stage1 = sum((read_run_state(source).tokens_per_language or {}).values()) or None
    return ReplayBudget(replayed=replayed, stage1=stage1, limit=recipe.data.replay.max_share)
