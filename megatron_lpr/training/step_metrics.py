"""The numbers of one step, the same at every layout: one all-reduce of a few hundred doubles.

Shapes: N layers with experts, L languages, C columns of `RouterStats`, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lpr.model.lpr_router import LPRRouter
from megatron_lpr.model.router_stats import LPR_LOSS, P_FROZEN, SLOTS, TOKENS
from megatron_lpr.platform import device
from megatron_lpr.reporting.metrics_log import OverLayers, RouterMetrics, RouterSummary
from megatron_lpr.training.step import RankLosses


@dataclass(frozen=True, kw_only=True)
class ReducedStats:
    """Global sums of one step."""

    ntp_loss: float
    token_loss_sums_L: torch.Tensor  # fp64
    sums_NLC: torch.Tensor  # fp64
    balance_N: torch.Tensor  # fp64, L_balance of each layer


def reduce_stats(
    routers: list[LPRRouter], *, moe_layers: Sequence[int], num_languages: int, num_experts: int, losses: RankLosses
) -> ReducedStats:
    """Sum over all ranks what each knows: its own layers, its own tokens, its part of the losses.

    moe_layers: numbers of all layers that have a router, from 0.
    """
    num_layers = len(moe_layers)
    shape = (num_layers, num_languages, SLOTS + num_experts)
    sizes = [1, num_languages, num_layers, math.prod(shape)]
    packed = torch.zeros(sum(sizes), dtype=torch.float64, device=device())
    ntp, token_loss_sums_L, balance_N, sums = packed.split(sizes)
    ntp[0], token_loss_sums_L[:] = losses.ntp_loss, losses.token_loss_sums_L
    sums_NLC = sums.view(shape)
    for router in routers:
        sums_LC, balance = router.stats.take()
        n = moe_layers.index(router.layer_number - 1)
        sums_NLC[n] += sums_LC.to(packed.device)
        balance_N[n] += balance.to(packed.device)
    dist.all_reduce(packed)
    ntp, token_loss_sums_L, balance_N, sums = packed.cpu().split(sizes)
    return ReducedStats(
        ntp_loss=float(ntp), token_loss_sums_L=token_loss_sums_L, sums_NLC=sums.view(shape), balance_N=balance_N
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


def router_metrics(
    sums_NLC: torch.Tensor, languages: tuple[str, ...], num_frozen: int, *, summary: bool, layers: bool
) -> dict[str, Any]:
    """Those of the entries router_summary and router of a step's metrics that are asked for."""
    metrics: dict[str, Any] = {}
    if summary or layers:
        record = router_record(sums_NLC, languages, num_frozen)
        if summary:
            metrics["router_summary"] = {language: router_summary(full) for language, full in record.items()}
        if layers:
            metrics["router"] = record
    return metrics


def router_summary(full: RouterMetrics) -> RouterSummary:
    """A language's statistics of all layers in nine numbers."""
    busiest_N = [len(load_E) * max(load_E) for load_E in full["load"]]
    return {
        "frozen_share": _over_layers(full["frozen_share"]),
        "p0": _over_layers(full["p0"]),
        "busiest_expert": _over_layers(busiest_N),
    }


def _over_layers(values_N: list[float]) -> OverLayers:
    return {"mean": sum(values_N) / len(values_N), "min": min(values_N), "max": max(values_N)}


def router_record(sums_NLC: torch.Tensor, languages: tuple[str, ...], num_frozen: int) -> dict[str, RouterMetrics]:
    """Per language: lists over layers of the frozen experts' share of slots, mean p_frozen, load of each expert."""
    record = {}
    for index, language in enumerate(languages):
        sums_NC = sums_NLC[:, index]
        if not sums_NC[0, TOKENS]:
            continue
        load_NE = sums_NC[:, SLOTS:] / sums_NC[:, SLOTS:].sum(1, keepdim=True)
        record[language] = {
            "frozen_share": load_NE[:, :num_frozen].sum(1).tolist(),
            "p0": (sums_NC[:, P_FROZEN] / sums_NC[:, TOKENS]).tolist(),
            "load": load_NE.tolist(),
        }
    return record
