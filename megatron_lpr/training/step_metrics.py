"""The numbers of one step, the same at every layout: one all-reduce of a few hundred doubles.

Shapes: N layers with experts, L languages, C columns of `RouterStats`, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lpr.model.lpr_router import LPRRouter
from megatron_lpr.model.router_stats import LPR_LOSS, P_FROZEN, SLOTS, TOKENS
from megatron_lpr.platform import device


@dataclass(frozen=True, kw_only=True)
class ReducedStats:
    """Global sums of one step."""

    ntp_loss: float
    sums_NLC: torch.Tensor  # fp64
    balance_N: torch.Tensor  # fp64, L_balance of each layer


def reduce_stats(
    routers: list[LPRRouter], *, moe_layers: Sequence[int], num_languages: int, num_experts: int, ntp_loss: float
) -> ReducedStats:
    """Sum over all ranks what each knows: its own layers, its own tokens, its share of L_NTP.

    moe_layers: numbers of all layers that have a router, from 0.
    """
    num_layers = len(moe_layers)
    shape = (num_layers, num_languages, SLOTS + num_experts)
    packed = torch.zeros(1 + num_layers + math.prod(shape), dtype=torch.float64, device=device())
    ntp, balance_N, sums_NLC = packed[:1], packed[1 : 1 + num_layers], packed[1 + num_layers :].view(shape)
    ntp[0] = ntp_loss
    for router in routers:
        sums_LC, balance = router.stats.take()
        n = moe_layers.index(router.layer_number - 1)
        sums_NLC[n] += sums_LC.to(packed.device)
        balance_N[n] += balance.to(packed.device)
    dist.all_reduce(packed)
    packed = packed.cpu()
    return ReducedStats(
        ntp_loss=float(packed[0]),
        sums_NLC=packed[1 + num_layers :].view(shape),
        balance_N=packed[1 : 1 + num_layers],
    )


def lpr_loss(stats: ReducedStats, is_original: list[bool]) -> float | None:
    """Mean over layers of the mean over original-language tokens; None where the step had no such token."""
    sums_NC = stats.sums_NLC[:, torch.tensor(is_original)].sum(1)
    tokens = float(sums_NC[0, TOKENS])
    return float(sums_NC[:, LPR_LOSS].mean()) / tokens if tokens else None


def router_record(sums_NLC: torch.Tensor, languages: tuple[str, ...], num_frozen: int) -> dict[str, Any]:
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
