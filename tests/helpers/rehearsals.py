"""Steps of layouts as real ranks make them, with the routing of a rehearsal."""

from collections.abc import Sequence

from megatron_lpr.families import Architecture
from megatron_lpr.planning.amounts import RankMemory, Traffic
from megatron_lpr.recipe.settings import Recipe


def count_really(cases: Sequence[tuple[Recipe, Architecture]]) -> list[tuple[RankMemory, Traffic]]:
    """On one rank: what it holds and sends in a step of each case."""
    from megatron_lpr.platform import leave_layout, megatron

    counted = []
    with megatron():
        from megatron_lpr.planning.even_routing import even_routing
        from megatron_lpr.planning.one_step import count_step

        for recipe, arch in cases:
            with even_routing():
                counted.append(count_step(recipe, arch))
            leave_layout()
    return counted
