"""What texts cost a model at any layout: forward passes through Megatron's pipeline schedule, and one sum.

Import it after `platform.prepare()`. Shapes: B windows, S positions of this rank, N texts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_lpr.evaluation.windows import RankShare, Text, Windows, rounds, windows_in_all
from megatron_lpr.model.passengers import passengers
from megatron_lpr.platform import device


@torch.no_grad()
def text_nats(
    chunks: Sequence[Any],
    texts: Sequence[Text],
    *,
    window: int,
    batch: int,
    tagged: bool = False,
    progress: Callable[[int, int], None] = lambda done, windows: None,
) -> list[float]:
    """The sum of -ln p over the scored tokens of each text: fp32 losses, summed in fp64. All ranks call it and get it.

    Args:
        chunks: this rank's GPTModels, in evaluation mode, without wrappers.
        window: tokens of context at most.
        batch: windows of one forward pass at most.
        tagged: routers that collect statistics take each text for a language of its own, in the order of `texts`.
        progress: told (windows done, windows) after each round, on every rank; what it raises on all of them ends it.
    """
    nats_N, share = torch.zeros(len(texts), dtype=torch.float64, device=device()), share_of_this_rank()
    in_all = windows_in_all(texts, window)
    for micro_batches, done in rounds(texts, window, batch, share):
        tokens_BS = micro_batches[0].tokens_BS
        reported = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward_step, len(texts), tagged),
            data_iterator=[iter(micro_batches) for _ in chunks] if len(chunks) > 1 else iter(micro_batches),
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=tokens_BS.shape[1] * share.context_size,
            micro_batch_size=len(tokens_BS),
            forward_only=True,
        )
        # only the last pipeline stage has losses; its tensor-parallel ranks all have the same
        if reported and parallel_state.get_tensor_model_parallel_rank() == 0:
            nats_N += torch.stack(reported).sum(0)
        progress(done, in_all)
    dist.all_reduce(nats_N)
    return nats_N.tolist()


def share_of_this_rank() -> RankShare:
    """As Megatron's process groups have it."""
    context = parallel_state.get_context_parallel_world_size()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return RankShare(
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=context,
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        # a context-parallel rank has two chunks of a window, of which tensor-parallel ranks have equal parts
        multiple=tensor * (2 * context if context > 1 else 1),
    )


def _forward_step(texts: int, tagged: bool, batches: Iterator[Windows], model: torch.nn.Module):
    windows = next(batches)
    tags_BS = windows.tags_BS.to(device()) if tagged else None
    losses_BS = model(
        input_ids=windows.tokens_BS.to(device()),
        position_ids=None,  # rotary embeddings count for themselves
        labels=windows.labels_BS.to(device()),
        **passengers(tags_BS),
    )
    return losses_BS, functools.partial(_nats, windows, texts)


def _nats(windows: Windows, texts: int, losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(no loss, no tokens, nats [N] to report), in the form that Megatron's schedules take."""
    zero = torch.zeros((), device=losses_BS.device)
    return zero, zero.int(), windows.nats(losses_BS, texts)
