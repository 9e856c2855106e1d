"""What a rank's collectives send over which link: to GPUs of its node, and to other nodes.

Megatron's order of ranks says who sits together: tensor-parallel neighbours first, pipeline stages last. A group of n
ranks, g of them in each node, moves the bytes below for each rank, as rings do (Thakur, Rabenseifner and Gropp, 2005,
doi 10.1177/1094342005051521); with one network card per GPU a node's part of the traffic is shared by its g.

    all_gather        input s, result n s       inside: (g - 1) n s / g     between: (n - g) s / g
    reduce_scatter    input n s, result s       the same
    all_reduce        input s                   a reduce_scatter of s and an all_gather of s / n
    all_to_all        input s, divided evenly   inside: (g - 1) s / n       between: (n - g) s / n
    send              input s                   s, where the neighbour is
"""

from dataclasses import dataclass

from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning.hardware import GPU
from megatron_lpr.planning.moves import Move


@dataclass(frozen=True)
class OnLinks:
    """Bytes that one GPU sends, over each kind of link."""

    inside: float = 0
    between: float = 0

    def __add__(self, other: "OnLinks") -> "OnLinks":
        return OnLinks(self.inside + other.inside, self.between + other.between)

    def seconds(self, gpu: GPU) -> float:
        """Both kinds of link at work at once, at their peak."""
        return max(self.inside / gpu.inside, self.between / gpu.between)


def on_links(move: Move, place: Place, gpu: GPU) -> OnLinks:
    """Of all calls of a move."""
    ranks, stride = place.size(move.ranks), place.stride(move.ranks)
    near = max(1, min(ranks, gpu.per_node // stride))
    total = float(move.bytes * move.calls)
    if move.collective == "send":
        return OnLinks(inside=total) if stride < gpu.per_node else OnLinks(between=total)
    if move.collective == "all_to_all":
        return OnLinks(inside=total * (near - 1) / ranks, between=total * (ranks - near) / ranks)
    whole = total * ranks if move.collective == "all_gather" else total
    both = 2 if move.collective == "all_reduce" else 1
    return OnLinks(
        inside=both * whole * (near - 1) / near,
        between=both * whole * (ranks - near) / (ranks * near),
    )
