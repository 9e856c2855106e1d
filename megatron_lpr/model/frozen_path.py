"""The model without its new experts: tokens go to the frozen ones only.

Shapes: T tokens, E experts, J frozen experts.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_lpr.model.lpr_router import LPRRouter


@contextlib.contextmanager
def frozen_experts_alone(routers: Sequence[LPRRouter]) -> Iterator[None]:
    """Inside it every token goes to the first of the frozen experts by these routers, as if there were no others.

    Of a dense base the frozen experts are its FFN, whose gates sum to one: with every other weight the base's, the
    model is the base, however far its routers have learnt. Of a base with experts it is that with the base's router
    rows only.
    """
    handles = [router.register_forward_hook(_among_frozen) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _among_frozen(
    router: LPRRouter, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    probs_TE, chosen_TE = output
    frozen = router.config.num_frozen_experts
    logits_TJ = router.gating(inputs[0]).flatten(0, 1)[:, :frozen]
    values, experts = logits_TJ.topk(min(router.topk, frozen))
    gates = values.softmax(-1).to(probs_TE.dtype)
    return (
        torch.zeros_like(probs_TE).scatter(1, experts, gates),
        torch.zeros_like(chosen_TE).scatter(1, experts, True),
    )
