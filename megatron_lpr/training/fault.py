"""Where a number that is not finite came from: the rank, the loss or the parameter's gradient, the documents.

Gradients are summed over the ranks before anybody looks at them. So the step is computed once more, without that sum;
each rank then looks at its own gradients. It is done in the failing case alone, by all ranks.
"""

import contextlib
import math
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from megatron_lpr.data.sampler.inspect_data import DocumentPlace, documents_of
from megatron_lpr.errors import UserError
from megatron_lpr.model.builder import named_weights
from megatron_lpr.training.hooks.hook import RunningTrainer
from megatron_lpr.training.step import RankLosses, forward_backward, micro_batches

_LARGE = 1e18  # a gradient whose square is near the end of float32
_SHOWN = 3
_SUMS = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")  # what Megatron's schedules call for it


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`what` in words, and the documents of the samples that it comes from, as far as that is known."""

    what: str
    documents: Sequence[DocumentPlace] = ()
    has_passed: bool = False  # the same step, computed again, was finite: neither the data nor the weights are to blame

    def __str__(self) -> str:
        if not self.documents:
            return self.what
        places = [
            f"{place['corpus']} document {place['document']:,} (tokens {place['first_token']:,} to "
            f"{place['first_token'] + place['tokens'] - 1:,})"
            for place in self.documents[:_SHOWN]
        ]
        more = [f"{len(self.documents) - _SHOWN:,} more"] if len(self.documents) > _SHOWN else []
        return f"{self.what}; it read {', '.join([*places, *more])}"


@dataclass(frozen=True, kw_only=True)
class OwnGradient:
    """A gradient of this rank alone. `place` counts in the order of the forward pass, over all pipeline stages."""

    name: str
    value: float
    place: tuple[int, int]
    of_an_expert: bool  # its tokens may be another rank's


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank has found."""

    rank: int
    host: str
    losses: dict[int, float]  # by micro-batch, those that are not finite
    gradients: list[OwnGradient]  # those that are not finite, or too large
    samples: list[list[int]]  # of each of its micro-batches


def find_fault(trainer: RunningTrainer, norm: float, losses: RankLosses) -> Fault:
    """Trace the norm of the step that `trainer` is making; the same on all ranks, which call it together."""
    own = RankReport(
        rank=dist.get_rank(),
        host=socket.gethostname(),
        losses={i: float(share) for i, share in enumerate(losses.of_micro_batches) if not torch.isfinite(share)},
        gradients=_own_gradients(trainer),
        samples=_own_samples(trainer),
    )
    reports: list[RankReport] = [own] * dist.get_world_size()
    dist.all_gather_object(reports, own)
    if not any(report.losses or report.gradients for report in reports):
        return Fault(
            what=f"the gradient norm is {norm}, but computed again it is finite on every rank", has_passed=True
        )
    what, samples = judge(reports, norm)
    try:
        plan = trainer.plan
        documents = documents_of(plan.manifest, plan.data, plan.train.seed, samples)
    except (UserError, OSError):  # a corpus is gone: what is known is told
        documents = []
    return Fault(what=what, documents=documents)


def judge(reports: Sequence[RankReport], norm: float) -> tuple[str, list[int]]:
    """What was not finite first, in words, and the samples that it comes from."""
    if guilty := [report for report in reports if report.losses]:
        first = guilty[0]
        what = f"the loss of {_where(guilty)} is {next(iter(first.losses.values()))}"
        return what, sorted({k for report in guilty for i in report.losses for k in report.samples[i]})
    bad = [(report, gradient) for report in reports for gradient in report.gradients]
    # the gradient of a dense weight is of the rank's own tokens
    bad = [found for found in bad if not found[1].of_an_expert] or bad
    place = max(gradient.place for _, gradient in bad)  # the backward pass came there first
    name, value = next((gradient.name, gradient.value) for _, gradient in bad if gradient.place == place)
    guilty = list({report.rank: report for report, _ in bad}.values())
    at_place = [report for report, gradient in bad if gradient.place == place]
    what = f"the gradient of {name} on {_where(at_place)} is {value:g}"
    if math.isfinite(value):
        what += f", too large for a norm in float32 ({norm})"
    return what, sorted({k for report in guilty for samples in report.samples for k in samples})


def _where(reports: Sequence[RankReport]) -> str:
    first, more = reports[0], len(reports) - 1
    return f"rank {first.rank} ({first.host}){f' and of {more} more' if more else ''}"


def _own_gradients(trainer: RunningTrainer) -> list[OwnGradient]:
    """Compute the step once more, without the sum over ranks."""
    plan = trainer.plan
    chunks: list[Any] = trainer.chunks
    for chunk in chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    batches = micro_batches(plan, trainer.consumed_samples).step(plan.train.global_batch_size, len(chunks))
    with _not_summed(chunks):
        forward_backward(plan, chunks, batches, trainer.counts)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    found = []
    for index, chunk in enumerate(chunks):
        parameter: Any
        for place, (name, parameter) in enumerate(named_weights([chunk])):
            if not parameter.requires_grad:
                continue
            largest = float(parameter.main_grad.abs().max())  # NaN where there is one
            if not largest < _LARGE:
                expert = not getattr(parameter, "allreduce", True)
                at = (index * stages + stage, place)
                found.append(OwnGradient(name=name, value=largest, place=at, of_an_expert=expert))
    return found


@contextlib.contextmanager
def _not_summed(chunks: Sequence[Any]) -> Iterator[None]:
    """Inside it a backward pass leaves each rank its own gradients."""
    config = get_model_config(chunks[0])
    before = {name: getattr(config, name) for name in _SUMS}
    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(chunk.no_sync())
        for name in _SUMS:
            setattr(config, name, None)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)


def _own_samples(trainer: RunningTrainer) -> list[list[int]]:
    """The samples of each micro-batch of this rank in the step, by their numbers in the run."""
    sizes, ranks = trainer.plan.train, parallel_state.get_data_parallel_world_size()
    size, first = sizes.micro_batch_size, trainer.consumed_samples
    first += parallel_state.get_data_parallel_rank() * size
    end = trainer.consumed_samples + sizes.global_batch_size
    return [list(range(k, k + size)) for k in range(first, end, size * ranks)]
