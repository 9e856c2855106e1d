"""The micro-batches of one optimizer step on one rank."""

from collections.abc import Iterator

from megatron_lpr.context_parallel import rank_positions
from megatron_lpr.data.replay_sampler import Batch, ReplaySampler


def micro_batches(
    sampler: ReplaySampler,
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    context_parallel_rank: int = 0,
    context_parallel_size: int = 1,
) -> Iterator[Batch]:
    """Samples [consumed, consumed + global batch) in turns over the data-parallel ranks.

    With context parallelism each rank has its positions of every sample; the labels, one position ahead, go along.

    Every rank of a model-parallel group computes the same batches by itself: the sampler is a pure function, so that
    nothing is broadcast and later pipeline stages know the language tags too.
    """
    stride = micro_batch_size * data_parallel_size
    first = consumed_samples + data_parallel_rank * micro_batch_size
    for offset in range(0, global_batch_size, stride):
        whole = sampler.fill(first + offset, micro_batch_size)
        yield Batch(
            **{
                name: rank_positions(array, context_parallel_rank, context_parallel_size)
                for name, array in vars(whole).items()
            }
        )
