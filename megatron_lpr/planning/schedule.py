"""How many micro-batches a pipeline stage holds at once, and what share of a step it waits.

The schedules are Megatron's: one forward and one backward pass in turn (PipeDream-Flush), and the interleaved one, both
described by Narayanan et al., arXiv 2104.04473.
"""

from megatron_lpr.model.rank.place import Place
from megatron_lpr.recipe.settings import TrainConfig


def micro_batches(train: TrainConfig, place: Place) -> int:
    """Of a step, on each data-parallel rank."""
    return train.global_batch_size // (train.micro_batch_size * place.data)


def on_their_way(place: Place, count: int) -> list[int]:
    """For each model chunk of a stage: micro-batches whose activations it holds when most of them are on their way."""
    stages, chunks = place.sizes.pipeline, place.sizes.virtual_pipeline
    if chunks == 1:
        return [min(count, stages - place.stage)]
    # forward passes before the first backward pass, and the one with which the two begin to take turns
    warm_up = 2 * (stages - place.stage - 1) + (chunks - 1) * stages
    held = [0] * chunks
    for number in range(min(warm_up + 1, count * chunks)):
        held[number // stages % chunks] += 1
    return held


def bubble(place: Place, count: int) -> float:
    """Time that a stage waits for others, as a multiple of the time that it works: (p - 1) / (v m)."""
    return (place.sizes.pipeline - 1) / (place.sizes.virtual_pipeline * count)
