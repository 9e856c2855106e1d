"""Megatron's DDP, (distributed) optimizer and learning-rate schedule over the trainable parameters only."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from megatron_lpr.model.fused_gradients import fuse_gradient_accumulation
from megatron_lpr.platform import on_leave
from megatron_lpr.platform.shards import marks_kept
from megatron_lpr.platform.shims import cuda_type_names
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.main_grads import add_in_parts
from megatron_lpr.training.not_finite import refuse_gradients_that_are_not_finite

# Megatron's mark of a parameter group with a learning rate of its own
_IS_ROUTERS = "is_decoupled_lr"


def wrap(recipe: Recipe, chunks: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Wrap for data parallelism what trains; gradients are summed in fp32, never averaged."""
    config = get_model_config(chunks[0])
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        overlap_grad_reduce=recipe.parallel.overlap_grad_reduce,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    if config.bf16:
        chunks = [_in_bfloat16(config, chunk) for chunk in chunks]
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if recipe.model.fused_kernels == "auto":
        fuse_gradient_accumulation(wrapped)
    if not recipe.parallel.overlap_grad_reduce:
        add_in_parts(wrapped)
    on_leave(functools.partial(_release, wrapped))
    config.finalize_model_grads_func = _sum_gradients
    if recipe.parallel.overlap_grad_reduce:
        config.no_sync_func = _per_chunk([chunk.no_sync for chunk in wrapped])
        # stages start their reductions together, where each would slow down the others' next pipeline messages
        config.grad_sync_func = _per_chunk([chunk.start_grad_sync for chunk in wrapped])
    return wrapped


def _in_bfloat16(config: Any, chunk: torch.nn.Module) -> Float16Module:
    """Megatron's wrapper, which converts what is bfloat16 already."""
    with marks_kept(chunk):
        return Float16Module(config, chunk)


def _per_chunk(functions: list[Callable]) -> list[Callable] | Callable:
    """As Megatron's schedules take them: a list for the interleaved one, the function itself for the others."""
    return functions if len(functions) > 1 else functions[0]


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Finish what `overlap_param_gather` has put off to the next forward pass: without it this rank has the newest
    values of its own shard of each parameter only."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _release(wrapped: list[DistributedDataParallel]) -> None:
    """Empty the wrappers, which no garbage collection would.

    Megatron's DDP hangs hooks that hold it on gradient accumulators that hold the hooks, outside Python's sight: with
    it the weights, the gradient buffers and the process groups (with gloo: their threads) would live for ever.
    """
    for chunk in wrapped:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.main_grad = None
                parameter.data = parameter.data.new_empty(0)
        vars(chunk).clear()


@functools.wraps(finalize_model_grads)
def _sum_gradients(model, num_tokens=None, **kwargs):
    """Without Megatron's division by tokens (and its broadcast and all-reduce): losses are divided already."""
    return finalize_model_grads(model, None, **kwargs)


class LearningRates(OptimizerParamScheduler):
    """Megatron's schedule in steps; the routers may have a multiple of it, warm-up and all."""

    def __init__(self, *args, routers: float | None, **kwargs) -> None:
        self._routers = routers
        super().__init__(*args, **kwargs)

    def get_lr(self, param_group: Mapping[str, Any]) -> float:
        lr = super().get_lr({})
        return lr * self._routers if self._routers and param_group[_IS_ROUTERS] else lr

    @property
    def lr(self) -> float:
        """That of the next step."""
        return self.get_lr({_IS_ROUTERS: False})

    @property
    def router_lr(self) -> float | None:
        """That of the routers, where they have their own."""
        return self.get_lr({_IS_ROUTERS: True}) if self._routers else None


def build_optimizer(recipe: Recipe, chunks: list[DistributedDataParallel]) -> tuple[MegatronOptimizer, LearningRates]:
    """AdamW over what `wrap` left trainable, and its schedule in steps."""
    assert recipe.train is not None
    settings, bf16 = recipe.optimizer, chunks[0].config.bf16
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    groups = get_standard_config_overrides(config)
    if settings.router_lr is not None:
        groups[ParamKey(name="*.mlp.router.weight")] = {_IS_ROUTERS: True}
    with cuda_type_names():
        optimizer = get_megatron_optimizer(config, chunks, groups)
    if bf16:
        _in_one_pass(optimizer)
    refuse_gradients_that_are_not_finite(optimizer)
    scheduler = LearningRates(
        optimizer,
        routers=None if settings.router_lr is None else settings.router_lr / settings.lr,
        init_lr=settings.lr / (settings.warmup_steps + 1),  # a first step at 0 would learn nothing
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=recipe.train.steps,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=recipe.train.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def _in_one_pass(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW on a CPU in one pass over its numbers, not eight; it rounds otherwise: not for fp32 models."""
    for one in optimizer.chained_optimizers:
        if isinstance(one.optimizer, torch.optim.AdamW):
            for group in one.optimizer.param_groups:
                if all(weight.device.type == "cpu" for weight in group["params"]):
                    group["fused"] = True


def update(optimizer: MegatronOptimizer) -> float:
    """Change the weights by the accumulated gradients; returns the gradient's norm before clipping.

    Raises:
        NotFinite: the norm is not finite; no weight has changed.
    """
    with cuda_type_names():
        updated, grad_norm, _ = optimizer.step()
    assert updated, "Megatron has skipped the step, as it does with a gradient scale only"
    return float(grad_norm)


def trainable_parameters(chunks: list[torch.nn.Module]) -> int:
    """Elements of this rank's trainable parameters."""
    return sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)


def optimizer_parameters(optimizer: MegatronOptimizer) -> int:
    """Elements that this rank's optimizer updates; with a distributed optimizer its own shard of them."""
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"])
