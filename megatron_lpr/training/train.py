"""The training loop of every recipe: post-pretraining, review, and the baselines.

Import it inside `platform.megatron()`; everything that a user can get wrong `plan_training` has checked before:

    plan = plan_training(load_recipe("stage1.yaml"))
    with run_folder(plan.recipe.output, plan.resume), megatron():
        Trainer(plan).run()

What happens around the loop (checkpoints, metrics, plots, ...) is the folder hooks.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron_lpr.checkpoint.load import load_checkpoint
from megatron_lpr.checkpoint.run_state import RunState
from megatron_lpr.checkpoint.save import CheckpointWriter
from megatron_lpr.errors import Stopped, UserError
from megatron_lpr.model.builder import global_counts, init_model_parallel, routers
from megatron_lpr.model.frozen_fp8 import cast_frozen_once
from megatron_lpr.model.load.weights import fill_under, fill_weights
from megatron_lpr.model.sharding import build_frozen
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.reporting.metrics_log import StepMetrics
from megatron_lpr.training.content import NamedBase, agreed_content
from megatron_lpr.training.fault import Fault
from megatron_lpr.training.hooks.built_in import built_in
from megatron_lpr.training.hooks.hook import Hook, failure_told
from megatron_lpr.training.not_finite import NotFinite, check_weights, explain, not_finite_weight, skip_or_stop
from megatron_lpr.training.optimizer import build_optimizer, gather_parameters, update, wrap
from megatron_lpr.training.plan import Plan
from megatron_lpr.training.step import forward_backward, micro_batches
from megatron_lpr.training.step_metrics import StatsOfStep, statistics_of, step_metrics
from megatron_lpr.training.votes import Votes


class Trainer:
    """A planned run on this rank: model, optimizer, and the loop over its steps.

    Attributes:
        chunks: this rank's model chunks, wrapped for data parallelism; `optimizer` and `scheduler` are Megatron's.
        bytes_read: of the base model's tensors, by this rank at the start.
        step: optimizer steps that the run has made, earlier starts included; `consumed_samples` and `tokens_seen`
            (scored tokens of each language) count along.
        saved_step: of the newest checkpoint; None before the first.
        skipped_steps: those of `step` that changed no weight (train.on_not_finite), earlier starts included.
        votes: what ranks tell each other with each step.
        writer: the checkpoint that is being written, if one is.
    """

    def __init__(self, plan: Plan, hooks: Iterable[Hook] = ()) -> None:
        """Build the model and give it its weights: the base's, those of `model.load`, or the run's own checkpoint.

        Args:
            hooks: what is called around the loop, after what every run does.
        """
        self.plan, self.recipe, recipe = plan, plan.recipe, plan.recipe
        init_model_parallel(recipe.parallel, recipe.cluster.collective_timeout_minutes)
        self.base = NamedBase(plan)
        chunks = build_frozen(recipe, plan.arch)
        if plan.resume is None:
            self.bytes_read = fill_weights(recipe, plan.arch, chunks, plan.source)
        else:
            self.bytes_read = fill_under(recipe, plan.arch, chunks, plan.resume)
        self.routers, self.counts = routers(*chunks), global_counts(*chunks)
        self.chunks = wrap(recipe, chunks)
        self.optimizer, self.scheduler = build_optimizer(recipe, self.chunks)
        if plan.resume is not None:
            load_checkpoint(plan.resume, self.chunks, self.optimizer, self.scheduler)
        check_weights(self.chunks, f"weights from {plan.resume or plan.source or recipe.model.base}")
        cast_frozen_once(recipe.fp8, self.chunks)
        self.counts.num_languages = len(plan.manifest.languages)
        for router in self.routers:
            router.stats.num_languages = self.counts.num_languages
        self.step = plan.first_step
        self.saved_step = plan.state.step if plan.state else None
        self.skipped_steps = plan.state.skipped_steps if plan.state else 0
        self.consumed_samples = plan.state.consumed_samples if plan.state else 0
        self.tokens_seen = Counter((plan.state and plan.state.tokens_per_language) or {})
        self.votes = Votes()
        settings = recipe.checkpoint
        self.writer = CheckpointWriter(recipe.output, keep=settings.keep, keep_every=settings.keep_every)
        self.micro_batches = micro_batches(plan, self.consumed_samples)
        self.hooks = [*built_in(self), *hooks]

    def run(self) -> None:
        """Train to the last step; all ranks call it.

        Raises:
            Stopped: a signal or the end of its time has stopped the run, which has saved.
        """
        with failure_told(self):
            for hook in self.hooks:
                hook.start(self)
            while not self.finished:
                for hook in self.hooks:
                    hook.before_step(self)
                metrics = self.finite_step()
                for hook in self.hooks:
                    hook.after_step(self, metrics)
                if not self.finished and self._asked_to_stop():
                    self.stop()
            for hook in self.hooks:
                hook.finish(self)

    def stop(self) -> NoReturn:
        """Save, unless that has been done at this step, and end this start of the run; all ranks call it."""
        if self.saved_step != self.step:
            self.save()
        for hook in self.hooks:
            hook.stop(self)
        raise Stopped

    def _asked_to_stop(self) -> bool:
        """The same on all ranks. A save takes long, and whoever asks meanwhile need not wait for one more step."""
        has_saved = self.saved_step == self.step
        return bool(self.votes.count("stop") or (has_saved and self.votes.count_now("stop")))

    @property
    def finished(self) -> bool:
        """Whether the run has made its last step."""
        return self.step >= self.plan.train.steps

    def finite_step(self) -> StepMetrics:
        """`train_step`; a loss that is not finite, though those of all ranks are, ends the run."""
        step, lr = self.step + 1, self.lr
        metrics = self.train_step()
        if not math.isfinite(metrics["ntp_loss"]) and "skipped" not in metrics:
            fault = Fault(what=f"the loss is {metrics['ntp_loss']}")
            self.finish_save()
            raise explain(fault, step=step, weight=not_finite_weight(self.chunks), lr=lr, saved=self.saved_step)
        return metrics

    def train_step(self) -> StepMetrics:
        """One optimizer step and its metrics, which are the same on every rank.

        Raises:
            UserError: a loss or gradient is not finite, and the step may not be skipped; no weight has changed. The
                session has ended.
        """
        self._check_session()
        start, sizes = time.perf_counter(), self.plan.train
        lr, router_lr = self.lr, self.scheduler.router_lr
        seen = self.plan.sampler.count(self.consumed_samples, sizes.global_batch_size)
        self.counts.tokens = max(seen.tokens, 1)
        self.counts.original_tokens = max(seen.original_tokens, 1)
        per_group = sizes.micro_batch_size if self.recipe.balance.group == "micro_batch" else 1
        self.counts.balance_groups = sizes.global_batch_size / per_group
        wanted = any(statistics_of(self.recipe.logging, self.step + 1, sizes.steps))
        for router in self.routers:
            router.stats.is_wanted = wanted
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = self.micro_batches.step(sizes.global_batch_size, len(self.chunks))
        losses = forward_backward(self.plan, self.chunks, batches, self.counts)
        stats = StatsOfStep(self, losses, with_routers=wanted)
        skipped: str | None = None
        try:
            grad_norm = update(self.optimizer)
            self.scheduler.step(increment=1)
        except NotFinite as error:
            grad_norm, skipped = error.norm, skip_or_stop(self, error, losses, lr=lr)
            self.skipped_steps += 1
        self.step += 1
        self.consumed_samples += sizes.global_batch_size
        self.tokens_seen.update(seen.tokens_per_language)
        metrics = step_metrics(self, seen, stats.read(), lr=lr, grad_norm=grad_norm, start=start, skipped=skipped)
        return metrics if router_lr is None else metrics | {"router_lr": router_lr}

    def _check_session(self) -> None:
        if not vars(self.chunks[0]):  # emptied when this process left the run
            raise UserError("the session of this Trainer has ended: work with it inside its `with session(plan)` block")

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.scheduler.lr

    def save(self, *, with_optimizer: bool = True, wait: bool = True) -> Path:
        """Write a checkpoint of this moment, from which the run can go on; returns its folder. All ranks call it.

        Args:
            wait: until it is whole and on the disk; without it training goes on when it is on the hosts, and the next
                save, or `finish_save`, waits for it.

        Raises:
            UserError: a rank could not write it, or the session has ended.
        """
        self._check_session()
        if self.writer.step not in (None, self.step) and not self.writer.has_ended and dist.get_rank() == 0:
            print(f"waits for the checkpoint of step {self.writer.step}, which is still being written", flush=True)
        begun, folder = self.writer.step, self.finish_save()
        if folder and begun == self.step:
            return folder
        gather_parameters(self.chunks)
        for hook in self.hooks:
            hook.before_save(self)
        state = RunState(
            step=self.step,
            consumed_samples=self.consumed_samples,
            has_optimizer=with_optimizer,
            recipe=to_tree(self.recipe),
            data_state=self.plan.sampler.state(self.consumed_samples),
            tokens_per_language=dict(self.tokens_seen),
            skipped_steps=self.skipped_steps,
            base=self.base.identity(),
            source=self.plan.origin,
            content=agreed_content(self.plan, self.finished),
        )
        learned = (self.optimizer, self.scheduler) if with_optimizer else (None, None)
        folder = self.writer.start(state, self.chunks, *learned, to_host=not wait)
        if wait:
            self.finish_save()
        return folder

    def finish_save(self) -> Path | None:
        """Wait for the checkpoint that is being written, if one is; returns its folder. All ranks call it.

        Raises:
            UserError: a rank could not write it; the checkpoints before it are whole.
        """
        step = self.writer.step
        if step is None:
            return None
        folder = self.writer.finish()
        self.saved_step = step
        for hook in self.hooks:
            hook.after_save(self, folder)
        return folder
