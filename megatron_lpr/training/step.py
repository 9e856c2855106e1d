"""Forward and backward of every micro-batch of a step through Megatron's pipeline schedule.

Shapes: B samples, S positions of a micro-batch, L languages.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_lpr.data.sampler.batches import MicroBatches, RankLayout
from megatron_lpr.data.sampler.replay_sampler import Batch
from megatron_lpr.losses import GlobalCounts, next_token_loss, token_loss_sums
from megatron_lpr.model.passengers import for_attention, passengers
from megatron_lpr.platform import device
from megatron_lpr.recipe.checks import use_transformer_engine
from megatron_lpr.training.plan import Plan


@dataclass(frozen=True, kw_only=True)
class RankLosses:
    """This rank's part of the losses of a step, on the device: nothing has waited for it."""

    ntp_loss: Tensor  # [], its share of L_NTP
    token_loss_sums_L: Tensor  # [L] fp64, of its own tokens
    of_micro_batches: Sequence[Tensor]  # [] each, of a rank that computes losses, whether or not they count


def forward_backward(
    plan: Plan, chunks: Sequence[torch.nn.Module], batches: list[Iterator[Batch]], counts: GlobalCounts
) -> RankLosses:
    """Accumulate the gradients of this rank's micro-batches of a step; returns this rank's part of the losses."""
    sizes = plan.train
    data_parallel = parallel_state.get_data_parallel_world_size()
    of_documents = functools.partial(
        for_attention,
        te=use_transformer_engine(plan.recipe.model.spec),
        context_parallel=plan.recipe.parallel.context,
    )
    reported = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, counts, of_documents),
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks,
        num_microbatches=sizes.global_batch_size // (sizes.micro_batch_size * data_parallel),
        seq_length=plan.data.seq_length,
        micro_batch_size=sizes.micro_batch_size,
        forward_only=False,
    )
    # only the last pipeline stage has losses; its tensor-parallel ranks all have the same
    if not reported or parallel_state.get_tensor_model_parallel_rank() > 0:
        return RankLosses(
            ntp_loss=torch.zeros((), device=device()),
            token_loss_sums_L=torch.zeros(counts.num_languages, dtype=torch.float64, device=device()),
            of_micro_batches=[share for share, _ in reported],
        )
    shares, sums_L = zip(*reported, strict=True)
    return RankLosses(
        ntp_loss=torch.stack(shares).sum(), token_loss_sums_L=torch.stack(sums_L).sum(0), of_micro_batches=shares
    )


def micro_batches(plan: Plan, consumed_samples: int) -> MicroBatches:
    """This rank's micro-batches of the samples from `consumed_samples` on."""
    layout = RankLayout(
        micro_batch_size=plan.train.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
    )
    return MicroBatches(plan.sampler, layout, consumed_samples=consumed_samples, read_ahead=plan.data.read_ahead)


def _forward_step(
    counts: GlobalCounts,
    of_documents: Callable[[np.ndarray], np.ndarray],
    batches: Iterator[Batch],
    model: torch.nn.Module,
):
    batch = next(batches)
    tags_BS = _on_device(batch.tags_BS)
    documents = None if batch.documents_BS is None else _on_device(of_documents(batch.documents_BS))
    token_loss_BS = model(
        input_ids=_on_device(batch.tokens_BS),
        position_ids=None,  # rotary embeddings count for themselves
        labels=_on_device(batch.labels_BS),
        **passengers(tags_BS, documents),
    )
    return token_loss_BS, functools.partial(_loss, counts, _on_device(batch.loss_mask_BS), tags_BS)


def _on_device(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    if device().type == "cuda":
        tensor = tensor.pin_memory()  # the copy of any other memory waits for what the device still has to do
    return tensor.to(device(), non_blocking=True)


def _loss(
    counts: GlobalCounts, loss_mask_BS: Tensor, tags_BS: Tensor, token_loss_BS: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(loss to differentiate, token count that Megatron shall not use, share and sums [L] to report)."""
    loss = next_token_loss(token_loss_BS, loss_mask_BS, counts)
    sums_L = token_loss_sums(token_loss_BS.detach(), tags_BS, counts.num_languages)
    share = loss.detach().clone()
    # A factor of one; of a loss that is not finite NaN, so that its gradient is not finite either, and all ranks know
    # of it by the gradient's norm, before a weight has changed and without a collective for it.
    return loss * (1 + 0 * share), torch.zeros((), dtype=torch.int, device=loss.device), (share, sums_L)
