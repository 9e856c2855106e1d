"""Which parameters learn. Frozen ones get no gradient buffer, no optimizer state and no weight gradient."""

from collections.abc import Callable, Iterable

import torch

POLICIES: dict[str, Callable[[str], bool]] = {
    "new_experts_and_routers": lambda name: ".mlp.router." in name or ".mlp.experts." in name,
    "routers": lambda name: ".mlp.router." in name,
    "all": lambda name: True,
}


def freeze(chunks: Iterable[torch.nn.Module], trainable: str) -> None:
    """Set `requires_grad` of every parameter by the policy; call it before Megatron's DDP is wrapped around."""
    learns = POLICIES[trainable]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(learns(name))


def is_trainable(name: str, trainable: str) -> bool:
    """Whether the policy lets the parameter of this (global) name learn."""
    return POLICIES[trainable](name)
