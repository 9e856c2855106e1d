"""The micro-batches of a rank, step after step."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lpr.data.sampler.replay_sampler import Batch, ReplaySampler
from megatron_lpr.platform.context_parallel import rank_positions


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Which share of every global batch a rank reads."""

    micro_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1

    @property
    def stride(self) -> int:
        """Samples from one of the rank's micro-batches to its next."""
        return self.micro_batch_size * self.data_parallel_size


class MicroBatches:
    """Samples from `consumed_samples` on, in turns over the data-parallel ranks, one micro-batch each.

    With context parallelism each rank has its positions of every sample; the labels, one position ahead, go along. The
    document numbers stay whole: a rank's queries meet the keys of the whole sequence.

    Every rank of a model-parallel group computes the same batches by itself: the sampler is a pure function, so that
    nothing is broadcast and later pipeline stages know the language tags too.
    """

    def __init__(self, sampler: ReplaySampler, layout: RankLayout, *, consumed_samples: int, read_ahead: int = 0):
        self._layout = layout
        first = consumed_samples + layout.data_parallel_rank * layout.micro_batch_size
        self._whole = sampler.batches(first, layout.micro_batch_size, layout.stride, read_ahead=read_ahead)

    def step(self, global_batch_size: int, num_chunks: int = 1) -> list[Iterator[Batch]]:
        """The next global batch: one iterator for each model chunk of the rank, all over the same micro-batches.

        The step must be read to its end before the next one begins.
        """
        batches = map(self._own, itertools.islice(self._whole, global_batch_size // self._layout.stride))
        return list(itertools.tee(batches, num_chunks)) if num_chunks > 1 else [batches]

    def _own(self, whole: Batch) -> Batch:
        layout = self._layout
        fields = {
            name: rank_positions(array, layout.context_parallel_rank, layout.context_parallel_size)
            for name, array in vars(whole).items()
            if name != "documents_BS"
        }
        return Batch(**fields, documents_BS=whole.documents_BS)
