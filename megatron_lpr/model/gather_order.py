"""In which order sharded weights are gathered ahead: FSDP2 is told so, and the plan steps through it.

A *unit* is what is gathered at once; a chunk has those of each layer, in the order in which the layer runs them.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeVar

Kind = Literal["attention", "ffn", "frozen experts", "new experts", "vocabulary"]


class Gathered(Protocol):
    """A unit, whoever looks at it."""

    @property
    def kind(self) -> Kind: ...


Unit = TypeVar("Unit", bound=Gathered)
Layers = Sequence[Sequence[Unit]]
Order = Iterator[tuple[Unit, Sequence[Unit]]]  # a unit that computes, and those that are gathered while it does


def in_forward(units: Sequence[Unit], ahead: int) -> Order:
    """The next `ahead` units, a layer's number of them, while one computes."""
    for index, unit in enumerate(units):
        yield unit, units[index + 1 : index + 1 + ahead]


def with_backward(layers: Layers, lowest: int) -> Layers:
    """The units of each layer that have a backward pass.

    Below the first router, in the layer `lowest`, nothing learns; the new experts that it sends tokens to pass its
    gradient on.
    """
    return [
        [unit for unit in layer if n > lowest or (n == lowest and unit.kind == "new experts")]
        for n, layer in enumerate(layers)
    ]


def in_backward(layers: Layers, last: Sequence[Unit], recompute: str) -> Order:
    """A layer's units while the one above it runs backward, in the order in which they are needed; the lowest first.

    last: the output layer's, if it has one of its own.
    """
    below: list[Unit] = []
    for layer in layers:
        for place, unit in enumerate(layer):
            following = layer[:place][::-1]
            if recompute == "none":
                following = [*following, *below][: len(layer)]  # as far ahead as in the forward pass
            yield unit, following if place or recompute == "none" else below
        if recompute == "none":
            below = [*layer[::-1]]
        else:  # what is computed again comes first, and in the order of the forward pass
            below = again_in_backward(layer, recompute)
    for unit in last:
        yield unit, below


def again_in_backward(layer: Sequence[Unit], recompute: str) -> list[Unit]:
    """What the backward pass of a layer computes a second time before anything else."""
    return [unit for unit in layer if recompute == "full" or unit.kind != "attention"]
