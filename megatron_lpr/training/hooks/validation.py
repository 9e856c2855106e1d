"""Held-out text during training: what each language costs, and what is kept of the base's.

It reads weights and nothing else: no gradient, no statistic of the routers, no sample and no generator state is
touched, so that a run has the same numbers with and without it.
"""

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config, unwrap_model

from megatron_lpr.errors import warn
from megatron_lpr.evaluation.forward import text_nats
from megatron_lpr.evaluation.perplexity import score
from megatron_lpr.evaluation.retention import bits_per_language, kept
from megatron_lpr.model.frozen_path import frozen_experts_alone
from megatron_lpr.platform import from_first_rank
from megatron_lpr.reporting.metrics_log import StepMetrics, ValidationRecord
from megatron_lpr.training.base_scores import FILE, Scores, base_is_at_hand, record, recorded
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer, is_validated
from megatron_lpr.training.hooks.watching import expect_no_step


class Validation(Hook):
    """Bits per byte and retention in the metrics of every `evaluation.every`-th step and the last.

    A run that is asked to stop meanwhile leaves the validation at its next forward pass, without a result.
    """

    def start(self, trainer: RunningTrainer) -> None:
        self._texts = from_first_rank(trainer.plan.held_out)
        self._base = self._of_base(trainer)

    def after_step(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if not is_validated(trainer, trainer.step):
            return
        start = time.perf_counter()
        with contextlib.suppress(_AskedToStop):
            scores = self._scores(trainer, f"the validation after step {trainer.step:,}", may_stop=True)
            found = ValidationRecord(bits_per_byte=bits_per_language(scores))
            if self._base is not None:
                found["retention"] = kept(self._base, scores)
            metrics["validation"] = found
            metrics["validation_seconds"] = time.perf_counter() - start
        expect_no_step(trainer, f"what follows step {trainer.step:,}")

    def _of_base(self, trainer: RunningTrainer) -> Scores | None:
        is_first = dist.get_rank() == 0
        found = from_first_rank(recorded(trainer.plan) if is_first else None)
        if found is None and base_is_at_hand(trainer.plan):
            with frozen_experts_alone(trainer.routers):
                found = self._scores(trainer, "the validation of the base")
        if is_first and found is not None:
            record(trainer.plan, found)
        elif is_first:
            warn(
                f"evaluation.every: no retention is logged, for the base cannot be scored any more and no {FILE} has "
                "its scores on this text; validate from the first step of stage 1 on"
            )
        return found

    def _scores(self, trainer: RunningTrainer, what: str, *, may_stop: bool = False) -> Scores:
        settings = trainer.recipe.evaluation

        def watched(done: int, windows: int) -> None:
            expect_no_step(trainer, what)
            if may_stop and trainer.votes.count_now("stop"):
                raise _AskedToStop

        watched_nats = functools.partial(text_nats, window=settings.window, batch=settings.batch, progress=watched)
        expect_no_step(trainer, what)
        with evaluating(trainer.chunks) as chunks:
            return score(lambda texts, progress: watched_nats(chunks, texts), self._texts)


class _AskedToStop(Exception):
    """On all ranks at once."""


@contextlib.contextmanager
def evaluating(wrapped: Sequence[Any]) -> Iterator[list[torch.nn.Module]]:
    """A trainer's chunks without their wrappers, in evaluation mode; afterwards they are as before."""
    config, chunks = get_model_config(wrapped[0]), [unwrap_model(chunk) for chunk in wrapped]
    hooked = [chunk for chunk in wrapped if chunk.ddp_config.overlap_param_gather]
    modes = [chunk.training for chunk in chunks]
    no_sync_func, fp8 = config.no_sync_func, config.fp8
    for chunk in hooked:
        chunk.disable_forward_pre_hook()  # gathers the newest parameters, which the next step then has already
    for chunk in chunks:
        chunk.eval()
    config.no_sync_func = None  # it would hold back gradients, and schedules leave it only after a backward pass
    config.fp8 = None  # held-out text is scored as after the run: in the dtype of the weights
    try:
        yield chunks
    finally:
        config.no_sync_func, config.fp8 = no_sync_func, fp8
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
