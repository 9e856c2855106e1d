"""How much of the original languages a run reads again, against the limit of the method."""

from dataclasses import dataclass

from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import DataConfig, TrainConfig


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
    train: TrainConfig, data: DataConfig, sampler: ReplaySampler, stage1_tokens: int | None
) -> ReplayBudget | None:
    """The budget of a run from its first step to its last; None where it replays nothing.

    Args:
        stage1_tokens: of the checkpoint that the weights come from, as far as the run knows.
    """
    replayed = sampler.count(0, train.steps * train.global_batch_size).original_tokens
    if not replayed:
        return None
    stage1 = stage1_tokens if data.replay.stage1_tokens is None else data.replay.stage1_tokens
    return ReplayBudget(replayed=replayed, stage1=stage1, limit=data.replay.max_share)
