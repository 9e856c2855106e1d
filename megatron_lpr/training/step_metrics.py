"""The numbers of one step, the same at every layout: one all-reduce of a few hundred doubles, and where a step logs
what routers do of N * L * C more: 33 MB where there are 200 languages, 80 layers and 256 experts.

Shapes: N layers with experts, L languages, C columns of `RouterStats`, E experts.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lpr.data.sampler.replay_sampler import BatchCounts
from megatron_lpr.model.router_stats import LPR_LOSS, P_FROZEN, SLOTS, TOKENS
from megatron_lpr.platform import device
from megatron_lpr.platform.to_host import ToHost
from megatron_lpr.recipe.settings import LoggingConfig
from megatron_lpr.reporting.metrics_log import OverLayers, RouterMetrics, RouterSummary, StepMetrics
from megatron_lpr.training.hooks.hook import RunningTrainer
from megatron_lpr.training.step import RankLosses
from megatron_lpr.training.throughput import throughput
from megatron_lpr.training.votes import KINDS


def step_metrics(
    trainer: RunningTrainer,
    seen: BatchCounts,
    stats: "ReducedStats",
    *,
    lr: float,
    grad_norm: float,
    start: float,
    skipped: str | None = None,
) -> StepMetrics:
    """The metrics of the step that `trainer` has just made; all ranks call it.

    Args:
        seen: what the step has read.
        start: when it began, by time.perf_counter.
        skipped: why it has changed no weight; the routers have seen nothing then.
    """
    plan, recipe, step = trainer.plan, trainer.recipe, trainer.step
    seconds = time.perf_counter() - start
    metrics = StepMetrics(
        step=step,
        steps=plan.train.steps,
        stage=recipe.name,
        ntp_loss=stats.ntp_loss,
        ntp_loss_per_language=loss_per_language(stats, seen.tokens_per_language),
        balance_loss=float(stats.balance_N.mean()) if recipe.balance.coeff else None,
        lpr_loss=None,
        grad_norm=grad_norm,
        lr=lr,
        tokens=seen.tokens,
        tokens_per_second=seen.tokens / seconds,
        tokens_per_language=dict(trainer.tokens_seen),
        seconds=seconds,
        consumed_samples=trainer.consumed_samples,
        skipped_steps=trainer.skipped_steps,
    )
    if skipped is not None:
        return metrics | {"skipped": skipped, "balance_loss": None}
    summary, layers = statistics_of(recipe.logging, step, plan.train.steps)
    if trainer.routers and not summary and not layers:
        is_trained_with = recipe.lpr.coeff and seen.original_tokens
        return metrics | {"lpr_loss": float(stats.lpr_N.mean()) if is_trained_with else None}
    metrics.update(throughput(plan, stats.sums_NLC, seconds))
    if trainer.routers:
        metrics["lpr_loss"] = lpr_loss(stats, plan.is_original)
        of_routers = stats.sums_NLC, plan.manifest.languages, recipe.model.num_frozen_experts
        if summary:
            metrics["router_summary"] = router_summary(*of_routers)
        if layers:
            metrics["router"] = router_record(*of_routers)
    return metrics


def statistics_of(logging: LoggingConfig, step: int, steps: int) -> tuple[bool, bool]:
    """Whether a step of so many has the routers' summary, and their statistics of every layer."""
    layers = step in (1, steps) or step % logging.router_layers_every == 0
    return step % logging.router_every == 0, layers


@dataclass(frozen=True, kw_only=True)
class ReducedStats:
    """Global sums of one step."""

    ntp_loss: float
    token_loss_sums_L: torch.Tensor  # fp64
    sums_NLC: torch.Tensor  # fp64; no layers in a step that logs nothing of them
    balance_N: torch.Tensor  # fp64, L_balance of each layer
    lpr_N: torch.Tensor  # fp64, L_LPR of each layer, where it is trained with


class StatsOfStep:
    """Sums over all ranks of what each knows: of its layers, its tokens, its part of the losses, and its votes.

    Made between the backward pass and the update, all ranks together, and read after the update: Megatron's gradient
    norm waits for the device in between, so that reading waits for nothing, and the device makes the update while the
    host prepares the next step.
    """

    def __init__(self, trainer: RunningTrainer, losses: RankLosses, *, with_routers: bool) -> None:
        """with_routers: the step logs what they did, or how many operations it took; the same on all ranks."""
        plan = trainer.plan
        moe_layers, num_languages = plan.arch.moe_layers(), len(plan.manifest.languages)
        self._votes = trainer.votes
        columns = SLOTS + plan.recipe.model.num_experts
        self._shape = (len(moe_layers) if with_routers else 0, num_languages, columns)
        self._sizes = [1, num_languages, len(moe_layers), len(moe_layers), math.prod(self._shape), len(KINDS)]
        packed = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device())
        ntp, token_loss_sums_L, balance_N, lpr_N, sums, said = packed.split(self._sizes)
        ntp[0], token_loss_sums_L[:] = losses.ntp_loss, losses.token_loss_sums_L
        sums_NLC = sums.view(self._shape)
        for router in trainer.routers:
            sums_LC, balance, lpr = router.stats.take()
            n = moe_layers.index(router.layer_number - 1)
            if with_routers:
                sums_NLC[n] += sums_LC
            balance_N[n] += balance
            lpr_N[n] += lpr
        self._votes.fill(said)
        dist.all_reduce(packed)
        self._packed = ToHost(packed)

    def read(self) -> ReducedStats:
        """The sums; the votes of all ranks count from now on."""
        ntp, token_loss_sums_L, balance_N, lpr_N, sums, said = self._packed.read().split(self._sizes)
        self._votes.settle(said)
        return ReducedStats(
            ntp_loss=float(ntp),
            token_loss_sums_L=token_loss_sums_L,
            sums_NLC=sums.view(self._shape),
            balance_N=balance_N,
            lpr_N=lpr_N,
        )


def loss_per_language(stats: ReducedStats, tokens: Mapping[str, int]) -> dict[str, float]:
    """Mean L_NTP over the scored tokens of each language; `tokens`, how many, of all languages in their order.

    A language without one in this step is left out. The mean of these, weighted by the tokens, is L_NTP.
    """
    sums = zip(tokens.items(), stats.token_loss_sums_L.tolist(), strict=True)
    return {language: loss / count for (language, count), loss in sums if count}


def lpr_loss(stats: ReducedStats, is_original: list[bool]) -> float | None:
    """Mean over layers of the mean over original-language tokens; None where the step had no such token."""
    sums_NC = stats.sums_NLC[:, torch.tensor(is_original)].sum(1)
    tokens = float(sums_NC[0, TOKENS])
    return float(sums_NC[:, LPR_LOSS].mean()) / tokens if tokens else None


def router_summary(sums_NLC: torch.Tensor, languages: tuple[str, ...], num_frozen: int) -> dict[str, RouterSummary]:
    """Each language's statistics of all layers in nine numbers.

    Every step may have it, on every rank: the load of each expert, millions of numbers, never becomes Python's.
    """
    seen, sums_NLC = _seen(sums_NLC, languages)
    slots_NLE = sums_NLC[..., SLOTS:]
    all_slots_NL = slots_NLE.sum(-1)
    statistics_3NL = torch.stack(
        [
            slots_NLE[..., :num_frozen].sum(-1) / all_slots_NL,
            sums_NLC[..., P_FROZEN] / sums_NLC[..., TOKENS],
            slots_NLE.amax(-1) * slots_NLE.shape[-1] / all_slots_NL,
        ]
    )
    over_layers = [statistics_3NL.mean(1), statistics_3NL.amin(1), statistics_3NL.amax(1)]
    rows = torch.stack(over_layers, dim=-1).transpose(0, 1).tolist()  # by language, statistic, and over the layers
    return {language: _summary(*row) for language, row in zip(seen, rows, strict=True)}


def _summary(frozen_share: list[float], p0: list[float], busiest_expert: list[float]) -> RouterSummary:
    def over_layers(mean: float, low: float, high: float) -> OverLayers:
        return {"mean": mean, "min": low, "max": high}

    return {
        "frozen_share": over_layers(*frozen_share),
        "p0": over_layers(*p0),
        "busiest_expert": over_layers(*busiest_expert),
    }


def _seen(sums_NLC: torch.Tensor, languages: tuple[str, ...]) -> tuple[list[str], torch.Tensor]:
    """The languages of which the step has a token, and their sums."""
    there = sums_NLC[0, :, TOKENS].tolist()
    if all(there):
        return list(languages), sums_NLC
    places = [place for place, tokens in enumerate(there) if tokens]
    return [languages[place] for place in places], sums_NLC[:, places]


def router_record(sums_NLC: torch.Tensor, languages: tuple[str, ...], num_frozen: int) -> dict[str, RouterMetrics]:
    """Per language: lists over layers of the frozen experts' share of slots, mean p_frozen, load of each expert."""
    seen, sums_NLC = _seen(sums_NLC, languages)
    record: dict[str, RouterMetrics] = {}
    for language, sums_NC in zip(seen, sums_NLC.unbind(1), strict=True):
        load_NE = sums_NC[:, SLOTS:] / sums_NC[:, SLOTS:].sum(1, keepdim=True)
        record[language] = {
            "frozen_share": load_NE[:, :num_frozen].sum(1).tolist(),
            "p0": (sums_NC[:, P_FROZEN] / sums_NC[:, TOKENS]).tolist(),
            "load": load_NE.tolist(),
        }
    return record
