"""The router over all experts, frozen ones first, with the losses that act on it.

Shapes: S positions of this rank, B sequences, T = S*B tokens, E experts, L languages.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
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

    The weight is fp32 in a model of any precision: bfloat16 has eight bits, and would lose most of what a step changes.
    """

    def __init__(self, config: LPRTransformerConfig, pg_collection=None, **kwargs) -> None:
        over_all = copy.copy(config)
        over_all.num_moe_experts, over_all.params_dtype = config.num_all_experts, torch.float32
        super().__init__(config=over_all, pg_collection=pg_collection, **kwargs)
        if not self.weight.is_meta:  # Megatron makes it on the host, and moves it when it is first asked for logits
            self.weight.data = self.weight.data.to(torch.cuda.current_device())
        self.counts = GlobalCounts()  # the trainer replaces it by the one that it updates every step
        self.stats = RouterStats(self.config.num_moe_experts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LPRRouter":
        """`.bfloat16()` of the whole model, by Megatron's wrapper and for evaluation, passes the router over."""

        def in_fp32(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            return converted if converted.dtype is tensor.dtype else tensor.to(converted.device)

        return super()._apply(in_fp32, recurse)

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
        """Logits [S, B, E] in fp32."""
        logits_TE = _Logits.apply(input.reshape(-1, input.shape[-1]), self.weight)
        return logits_TE.view(*input.shape[:-1], -1)

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


class _Logits(torch.autograd.Function):
    """x W^T in fp32, of which x is kept as it is.

    In place of Megatron's, which hands Transformer Engine's product two precisions at once, and computes the gradient
    of x even where nobody needs it.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x_TH, weight_EH)
        return torch.mm(x_TH.float(), weight_EH.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        [grad_TE], (x_TH, weight_EH) = gradients, ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_TH = torch.mm(grad_TE, weight_EH).to(x_TH.dtype) if needs_x else None
        return grad_TH, torch.mm(grad_TE.t(), x_TH.float()) if needs_weight else None
