"""What collectives carry: how often, how much, among which ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_lpr.model.rank.place import Group, Place
from megatron_lpr.planning.amounts import Amount, Collective, Traffic


@dataclass(frozen=True)
class Move:
    """calls: in one step. bytes: of the input of one call.

    purpose: the group by which it is told; `ranks`, by which it is sent, may be another.
    """

    collective: Collective
    ranks: Group
    bytes: int
    calls: int = 1
    purpose: Group | None = None


def counted(moves: Iterable[Move]) -> Traffic:
    """Summed by collective and group."""
    found: dict[tuple[Collective, Group], Amount] = {}
    for move in moves:
        key = (move.collective, move.purpose or move.ranks)
        found[key] = found.get(key, Amount()) + Amount(move.calls, move.calls * move.bytes)
    return found


def repeated(moves: Iterable[Move], times: int) -> list[Move]:
    return [Move(m.collective, m.ranks, m.bytes, m.calls * times, m.purpose) for m in moves]


def in_groups(moves: Iterable[Move], place: Place) -> list[Move]:
    """Those that are made, and that have somebody to send to."""
    return [move for move in moves if place.size(move.ranks) > 1 and move.calls and move.bytes]
