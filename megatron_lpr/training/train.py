"""The training loop of every recipe: post-pretraining, review, and the baselines.

Import it after `platform.prepare()`; everything that a user can get wrong has been checked by `plan_training`.
"""

import math
import time
from collections import Counter

import torch.distributed as dist
import yaml
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from megatron_lpr.checkpoint import checkpointing
from megatron_lpr.checkpoint.run_state import RunState
from megatron_lpr.checkpoint.same_run import changed_settings
from megatron_lpr.conversion.load.weights import fill_weights, frozen_digest
from megatron_lpr.data.sampler.batches import MicroBatches, RankLayout
from megatron_lpr.model.builder import build_model, global_counts, init_model_parallel, routers
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.training import step_metrics
from megatron_lpr.training.not_finite import NotFinite, check_weights, explain
from megatron_lpr.training.optimizer import (
    build_optimizer,
    gather_parameters,
    optimizer_parameters,
    trainable_parameters,
    wrap,
)
from megatron_lpr.training.plan import Plan
from megatron_lpr.training.reporting import Reporter
from megatron_lpr.training.step import train_step


class Trainer:
    """A planned run on this rank: model, optimizer, and the loop over steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.recipe = plan, plan.recipe
        recipe = plan.recipe
        init_model_parallel(recipe.parallel)
        chunks = build_model(recipe, plan.arch)
        if plan.resume is None:
            fill_weights(recipe, plan.arch, chunks, plan.source)
        self.counts = global_counts(*chunks)
        self.counts.num_languages = len(plan.manifest.languages)
        self.chunks = wrap(recipe, chunks)
        self.optimizer, self.scheduler = build_optimizer(recipe, self.chunks)
        get_model_config(self.chunks[0]).grad_scale_func = self.optimizer.scale_loss
        if plan.resume is not None:
            checkpointing.load(plan.resume, self.chunks, self.optimizer, self.scheduler)
        check_weights(self.chunks, f"weights from {plan.resume or plan.source or recipe.model.base}")
        self.routers = routers(*self.chunks)
        for router in self.routers:
            router.stats.num_languages = len(plan.manifest.languages)
        self.step = plan.first_step
        self.saved_step = plan.state.step if plan.state else None
        self.consumed_samples = plan.state.consumed_samples if plan.state else 0
        self.tokens_seen = Counter(plan.state.tokens_per_language if plan.state else {})
        self.frozen_digest = frozen_digest(self.chunks)
        self.micro_batches = MicroBatches(
            plan.sampler,
            RankLayout(
                micro_batch_size=recipe.train.micro_batch_size,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                context_parallel_rank=parallel_state.get_context_parallel_rank(),
                context_parallel_size=parallel_state.get_context_parallel_world_size(),
            ),
            consumed_samples=self.consumed_samples,
            read_ahead=recipe.data.read_ahead,
        )

    def run(self) -> None:
        """Train to the last step, logging and saving on the way."""
        self._announce()
        for chunk in self.chunks:
            chunk.train()
        reporter = Reporter(self.recipe, resumed_step=self.step)
        every = self.recipe.checkpoint.every
        while self.step < self.recipe.train.steps:
            reporter.step(self.finite_step())
            last = self.step == self.recipe.train.steps
            if last or (every and self.step % every == 0):
                self.save(last)
        reporter.finish()

    def finite_step(self) -> dict:
        """`train_step`; a number that is not finite ends the run with what is known of its cause."""
        step, lr = self.step + 1, self.optimizer.param_groups[0]["lr"]
        try:
            metrics = self.train_step()
            if not math.isfinite(metrics["ntp_loss"]):
                raise NotFinite(f"the loss is {metrics['ntp_loss']}")
        except NotFinite as error:
            raise explain(error, step, self.chunks, lr, self.saved_step) from None
        return metrics

    def train_step(self) -> dict:
        """One optimizer step and its metrics, which are the same on every rank."""
        start = time.perf_counter()
        recipe, sampler = self.recipe, self.plan.sampler
        samples = recipe.train.global_batch_size
        seen = sampler.count(self.consumed_samples, samples)
        self.counts.tokens = max(seen.tokens, 1)
        self.counts.original_tokens = max(seen.original_tokens, 1)
        per_micro_batch = recipe.train.micro_batch_size if recipe.balance.group == "micro_batch" else 1
        self.counts.balance_groups = samples / per_micro_batch
        batches = self.micro_batches.step(samples, len(self.chunks))
        lr = self.optimizer.param_groups[0]["lr"]
        result = train_step(recipe, self.chunks, self.optimizer, self.scheduler, batches, self.counts)
        self.step += 1
        self.consumed_samples += samples
        self.tokens_seen.update(seen.tokens_per_language)
        return self._metrics(seen, result, lr, start)

    def _metrics(self, seen, result, lr: float, start: float) -> dict:
        recipe, plan = self.recipe, self.plan
        stats = step_metrics.reduce_stats(
            self.routers,
            moe_layers=plan.arch.moe_layers(),
            num_languages=len(plan.manifest.languages),
            num_experts=recipe.model.num_experts,
            losses=result.losses,
        )
        seconds = time.perf_counter() - start
        metrics = {
            "step": self.step,
            "steps": recipe.train.steps,
            "stage": recipe.name,
            "ntp_loss": stats.ntp_loss,
            "ntp_loss_per_language": step_metrics.loss_per_language(stats, seen.tokens_per_language),
            "balance_loss": float(stats.balance_N.mean()) if recipe.balance.coeff else None,
            "lpr_loss": step_metrics.lpr_loss(stats, plan.is_original) if self.routers else None,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": seen.tokens,
            "tokens_per_second": seen.tokens / seconds,
            "tokens_per_language": dict(self.tokens_seen),
            "seconds": seconds,
            "consumed_samples": self.consumed_samples,
        }
        if self.routers:
            first_or_last = self.step in (1, recipe.train.steps)
            metrics |= step_metrics.router_metrics(
                stats.sums_NLC,
                plan.manifest.languages,
                recipe.model.num_frozen_experts,
                summary=self.step % recipe.logging.router_every == 0,
                layers=first_or_last or self.step % recipe.logging.router_layers_every == 0,
            )
        return metrics

    def save(self, last: bool) -> None:
        """Write a checkpoint; a frozen weight that is not what it was at the start is a bug, and stops the run."""
        assert frozen_digest(self.chunks) == self.frozen_digest, "a frozen weight has changed"
        gather_parameters(self.chunks)
        with_optimizer = self.recipe.checkpoint.final_optimizer or not last
        state = RunState(
            step=self.step,
            consumed_samples=self.consumed_samples,
            has_optimizer=with_optimizer,
            recipe=to_tree(self.recipe),
            data_state=self.plan.sampler.state(self.consumed_samples),
            tokens_per_language=dict(self.tokens_seen),
            base=self.plan.base,
            source=self.plan.origin,
        )
        optimizer, scheduler = (self.optimizer, self.scheduler) if with_optimizer else (None, None)
        keep = self.recipe.checkpoint.keep
        folder = checkpointing.save(self.recipe.output, state, self.chunks, optimizer, scheduler, keep)
        self.saved_step = self.step
        if dist.get_rank() == 0:
            print(f"saved {folder}", flush=True)

    def _announce(self) -> None:
        if dist.get_rank() != 0:
            return
        path = self.plan.recipe_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(to_tree(self.recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
        if self.plan.state:
            print(f"resumes at step {self.step} from {self.plan.resume}")
            for change in changed_settings(self.recipe, self.plan.state):
                print(f"  changed: {change}")
        total = sum(p.numel() for chunk in self.chunks for p in chunk.parameters())
        print(
            f"parameters on rank 0: {total:,}, trainable {trainable_parameters(self.chunks):,}, "
            f"in its optimizer {optimizer_parameters(self.optimizer):,}",
            flush=True,
        )
