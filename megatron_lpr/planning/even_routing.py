"""Routers that give every expert its share: what a rehearsal decides where the tokens of a real run would.

The slots of all tokens go to the experts in turn, the last expert first: their counts differ by one at most, the frozen
ones have the smaller, on every rank alike. Shapes: T tokens of a rank, E experts, k of which each token takes.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from megatron_lpr.model.lpr_router import LPRRouter
from megatron_lpr.planning.shapes_only import real_tensors


def even_choice(tokens: int, experts: int, topk: int) -> Tensor:
    """Which token takes which experts: bool [T, E]."""
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    slots = torch.arange(tokens * topk)
    chosen_TE[slots // topk, experts - 1 - slots % experts] = True
    return chosen_TE


@contextlib.contextmanager
def even_routing() -> Iterator[None]:
    """Inside it every router of this process chooses evenly; its probabilities, losses and statistics stay."""
    route = LPRRouter.forward

    def forward(self: LPRRouter, *args, **kwargs) -> tuple[Tensor, Tensor]:
        probs_TE, chosen_TE = route(self, *args, **kwargs)
        with real_tensors():  # values, where everything around has shapes only
            return probs_TE, even_choice(len(chosen_TE), chosen_TE.shape[1], self.topk)

    with mock.patch.object(LPRRouter, "forward", forward):
        yield
