"""Megatron's DDP, (distributed) optimizer and learning-rate schedule over the trainable parameters only."""

import functools
from collections.abc import Callable

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from megatron_lpr.platform import on_leave
from megatron_lpr.platform.shims import cuda_type_names
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.not_finite import refuse_gradients_that_are_not_finite


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
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    on_leave(functools.partial(_release, wrapped))
    config.finalize_model_grads_func = _sum_gradients
    if recipe.parallel.overlap_grad_reduce:
        config.no_sync_func = _per_chunk([chunk.no_sync for chunk in wrapped])
        # stages start their reductions together, where each would slow down the others' next pipeline messages
        config.grad_sync_func = _per_chunk([chunk.start_grad_sync for chunk in wrapped])
    return wrapped


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


def build_optimizer(
    recipe: Recipe, chunks: list[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
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
    with cuda_type_names():
        optimizer = get_megatron_optimizer(config, chunks)
    refuse_gradients_that_are_not_finite(optimizer)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
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


def update(optimizer: MegatronOptimizer) -> float:
    """Change the weights by the accumulated gradients; returns the gradient's norm before clipping.

    Raises:
        NotFinite: the norm is not finite; no weight has changed.
    """
    with cuda_type_names():
        updated, grad_norm, _ = optimizer.step()
    assert updated, "Megatron has skipped the step, as it does with a gradient scale only"
    return float(grad_norm)


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Moments of zero where Adam has made no step yet, as it would begin with: Megatron cannot save it without any."""
    for one in optimizer.chained_optimizers:
        if getattr(one, "is_stub_optimizer", False):
            continue
        one.init_state_fn(one.optimizer, one.config)
        if isinstance(one.optimizer, torch.optim.Adam):
            for group in one.optimizer.param_groups:
                for parameter in group["params"]:
                    one.optimizer.state[parameter].setdefault("step", torch.tensor(0.0))


def trainable_parameters(chunks: list[torch.nn.Module]) -> int:
    """Elements of this rank's trainable parameters."""
    return sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)


def optimizer_parameters(optimizer: MegatronOptimizer) -> int:
    """Elements that this rank's optimizer updates; with a distributed optimizer its own shard of them."""
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"])
