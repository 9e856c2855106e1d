"""Megatron's buffers of gradients: which parameters lie in which bucket, and where, with their padding.

As megatron/core/distributed/param_and_grad_buffer.py lays them out (0.16 and 0.19 alike): parameters in reverse order,
each aligned to 64 elements, buckets to a multiple of their ranks and 128; without the distributed optimizer nothing is
padded.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_lpr.model.parameters import itemsize
from megatron_lpr.model.rank.parameters import Parameter
from megatron_lpr.model.rank.place import Group, Place

_ALIGNED, _BUCKETS_ALIGNED = 64, 128
_LEAST_BUCKET, _BUCKET_OF_A_RANK = 40_000_000, 1_000_000  # elements, where reductions overlap the backward pass


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """What one collective carries: elements with the padding, and where each parameter lies in them.

    itemsize: bytes of an element of the parameters; those of gradients are fp32.
    """

    group: Group
    itemsize: int
    elements: int
    parameters: Sequence[tuple[int, int]]

    def shard(self, index: int, ranks: int) -> int:
        """Elements of parameters, without padding, in the part of one of its ranks."""
        size = self.elements // ranks
        first, last = index * size, (index + 1) * size
        return sum(max(0, min(stop, last) - max(start, first)) for start, stop in self.parameters)


def buckets(chunks: Iterable[Sequence[Parameter]], place: Place, dtype: str) -> list[Bucket]:
    """Of all trainable parameters of a rank, in a model of this dtype: those of another precision have their own."""
    found = []
    for number, chunk in enumerate(chunks):
        groups: dict[tuple[Group, int], list[Parameter]] = {}
        for parameter in (p for p in chunk if p.learns):
            group: Group = "expert_data" if parameter.copies == "expert_data" else "data"
            groups.setdefault((group, itemsize(parameter.name, dtype)), []).append(parameter)
        for (group, size), learning in groups.items():
            # buckets are split on the first stage alone, where the reductions are on the critical path
            split = place.sizes.overlap_grad_reduce and place.is_first and number == 0
            largest = max(_LEAST_BUCKET, _BUCKET_OF_A_RANK * place.data) if split else None
            found += list(_lay_out(learning, group, size, place, largest))
    return found


def _lay_out(
    learning: Sequence[Parameter], group: Group, itemsize: int, place: Place, largest: int | None
) -> Iterable[Bucket]:
    distributed = place.sizes.distributed_optimizer
    aligned = _ALIGNED if distributed else 1
    multiple = math.lcm(place.size(group), _BUCKETS_ALIGNED) if distributed else 1
    position, inside = 0, list[tuple[int, int]]()

    def close() -> Bucket:
        nonlocal position, inside
        bucket = Bucket(group=group, itemsize=itemsize, elements=_padded(position, multiple), parameters=inside)
        position, inside = 0, []
        return bucket

    for parameter in reversed(learning):
        position = _padded(position, aligned)
        alone = parameter.twin and distributed  # so that both stages divide it alike
        if alone and inside:
            yield close()
        inside.append((position, position + parameter.elements))
        position += parameter.elements
        if alone or (largest is not None and position >= largest):
            yield close()
    if inside:
        yield close()


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
