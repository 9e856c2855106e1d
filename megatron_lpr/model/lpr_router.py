"""The router over all experts, frozen ones first, with the losses that act on it.

Shapes: S positions of this rank, B sequences, T = S*B tokens, E experts, L languages.
"""

import copy
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_lpr.losses import GlobalCounts, balance_loss, lpr_loss, lpr_token_loss
from megatron_lpr.model.router_stats import RouterStats
from megatron_lpr.model.transformer_config import LPRTransformerConfig


class LPRRouter(TopKRouter):
    """Top-k of a softmax over frozen and new experts, in fp32, renormalised over the chosen ones.

    The auxiliary losses hang on the returned probabilities, already divided by the counts of the global batch and
    by the number of layers (the paper averages over layers), so that their gradient needs no further scaling.
    """

    def __init__(self, config: LPRTransformerConfig, pg_collection=None, **kwargs) -> None:
        over_all = copy.copy(config)
        over_all.num_moe_experts = config.num_all_experts
        super().__init__(config=over_all, pg_collection=pg_collection, **kwargs)
        if self.weight.device.type == "cpu":  # Megatron-Core makes it there, and moves it in its own `gating` only
            self.weight.data = self.weight.data.to(torch.cuda.current_device())
        self.counts = GlobalCounts()  # the trainer replaces it by the one that it updates every step
        self.stats = RouterStats(self.config.num_moe_experts)

    def forward(self, input: Tensor, tags_SB: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            input: [S, B, H].
            tags_SB: language tags (passengers.py); None in inference.

        Returns:
            probs [T, E] (zero where not chosen) and routing map [T, E], bool.
        """
        logits_SBE = self.gating(input)
        logits_TE = logits_SBE.reshape(-1, logits_SBE.shape[-1]).float()
        probs_TE, chosen_TE = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=False,  # pre-softmax does not preserve the dense function
            score_function="softmax",
            fused=self.config.moe_router_fusion,
        )
        if tags_SB is not None:
            # a recomputed forward runs twice in training, first without gradients: one of them counts
            if self.training == torch.is_grad_enabled():
                self.stats.add(logits_TE.detach(), chosen_TE, tags_SB, self._token_loss)
            if self.training and torch.is_grad_enabled():
                probs_TE = self._attach_losses(probs_TE, logits_TE, chosen_TE, tags_SB)
        return probs_TE, chosen_TE

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] in fp32. Megatron's own product computes the input's gradient even where nobody needs it."""
        if input.requires_grad:
            return super().gating(input)
        return F.linear(input.float(), self.weight.float())

    @property
    def _token_loss(self) -> "partial[Tensor]":
        return partial(
            lpr_token_loss,
            num_frozen=self.config.num_frozen_experts,
            double_softmax=self.config.lpr_double_softmax,
        )

    def _attach_losses(self, probs_TE: Tensor, logits_TE: Tensor, chosen_TE: Tensor, tags_SB: Tensor) -> Tensor:
        config, num_layers = self.config, self.config.num_moe_layers
        if config.lpr_coeff:
            loss = lpr_loss(self._token_loss(logits_TE), tags_SB.reshape(-1), self.counts)
            self.stats.lpr += loss.detach()
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, loss * (config.lpr_coeff / num_layers))
        if config.balance_coeff:
            shape = (*tags_SB.shape, logits_TE.shape[-1])
            loss = balance_loss(
                logits_TE.softmax(-1).view(shape),
                chosen_TE.view(shape),
                tags_SB != 0,
                self.counts,
                self._sum_over_sequence_shards,
                config.balance_per_sequence,
            )
            self.stats.balance += loss.detach()
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, loss * (config.balance_coeff / num_layers))
        return probs_TE

    def _sum_over_sequence_shards(self, counts: Tensor) -> None:
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
