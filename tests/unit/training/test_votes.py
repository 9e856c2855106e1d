"""Votes count on every rank alike, once, at the step before which they were said; the metrics beside them stay."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_lpr.testing.run_distributed import run_distributed
from megatron_lpr.training.votes import KINDS, Votes


def counts(votes):
    return {kind: votes.count(kind) for kind in KINDS if votes.count(kind)}


def two_steps():
    """On a rank: what it counts after each of two steps, and the sums of what is no vote."""
    from megatron_lpr.platform import megatron

    seen = []
    with megatron() as ranks:
        from megatron_lpr.training.step import RankLosses
        from megatron_lpr.training.step_metrics import StatsOfStep

        votes = Votes()
        plan = SimpleNamespace(
            arch=SimpleNamespace(moe_layers=tuple),
            manifest=SimpleNamespace(languages=("qaa", "qab", "qac")),
            recipe=SimpleNamespace(model=SimpleNamespace(num_experts=0)),
        )
        trainer = SimpleNamespace(plan=plan, routers=[], votes=votes)
        for step in (1, 2):
            if step == 1:
                votes.say("written")
                votes.say("written")
                if ranks.rank == 1:
                    votes.say("stop")
            losses = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(ranks.rank))
            of_rank = RankLosses(ntp_loss=losses[0].clone(), token_loss_sums_L=losses, of_micro_batches=())
            stats = StatsOfStep(trainer, of_rank, with_routers=step == 1).read()
            dist.all_reduce(losses)
            same = stats.ntp_loss == float(losses[0]) and torch.equal(stats.token_loss_sums_L, losses)
            seen.append((counts(votes), same))
    return seen


def test_ranks_count_alike_and_metrics_do_not_change():
    for seen in run_distributed(two_steps, 2):
        assert seen == [({"stop": 1, "written": 2}, True), ({}, True)]


def test_what_is_said_again_counts_again():
    votes, doubles = Votes(), torch.zeros(len(KINDS), dtype=torch.float64)
    assert counts(votes) == {}
    votes.say("save")
    votes.fill(doubles)
    votes.say("save")  # too late for this step
    votes.settle(doubles)
    assert counts(votes) == {"save": 1}
    later = torch.zeros_like(doubles)
    votes.fill(later)
    assert torch.equal(later, doubles)
