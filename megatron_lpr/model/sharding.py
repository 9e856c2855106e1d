"""Frozen weights that are there once: each rank holds some rows, and all are gathered where they compute.

PyTorch's FSDP2 does it for weights that have no gradient: an all-gather before a module computes, in the forward pass
and again in the backward pass, and nothing else. What trains stays with Megatron's DDP and optimizer. A *unit* is what
is gathered at once, over the ranks of one pipeline stage that would hold copies of it:

    frozen experts of a layer          all of them: tensor x context x data
    attention, FFN without experts,    context x data; each tensor-parallel rank has a slice of its own
    embedding, output layer
    new experts (stage 2, evaluation)  expert data: those that have the same experts

Norms and routers are small and stay as they are. All ranks of a group run the units in the same order, whatever tokens
they have: a frozen expert is called with none too.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache, _clear_python_sharding_prop_cache

from megatron_lpr.families import Architecture
from megatron_lpr.model.builder import build_model
from megatron_lpr.model.gather_order import Kind, in_backward, in_forward, with_backward
from megatron_lpr.model.parameters import freeze
from megatron_lpr.model.rank.frozen import shards_frozen
from megatron_lpr.platform import device, on_leave
from megatron_lpr.platform.shards import mark_group, marks_kept
from megatron_lpr.recipe.settings import Recipe


class Unit(NamedTuple):
    """Modules that are gathered together, and the ranks that share them."""

    modules: list[torch.nn.Module]
    group: dist.ProcessGroup
    kind: Kind


def build_frozen(recipe: Recipe, arch: Architecture) -> list[torch.nn.Module]:
    """`build_model`, frozen by the recipe's policy, and frozen weights sharded where the recipe says so.

    Where the recipe trains nothing, every weight is frozen.
    """
    trainable, recompute = (recipe.train.trainable, recipe.train.recompute) if recipe.train else (None, "none")
    if not shards_frozen(recipe, arch, dist.get_world_size()):
        chunks = build_model(recipe, arch)
        freeze(chunks, trainable)
        return chunks
    # FSDP2 lets go of gathered weights on the main stream, while a side stream may still compute with them
    parallel = dataclasses.replace(recipe.parallel, overlap_frozen="off")
    with _parameters_without_memory():
        chunks = build_model(dataclasses.replace(recipe, parallel=parallel), arch)
    on_leave(functools.partial(_release, chunks))
    freeze(chunks, trainable)
    for chunk in chunks:
        with marks_kept(chunk):
            units = _shard(chunk, recompute)
            chunk._apply(_with_memory)
        for unit in units:
            for module in unit.modules:
                for parameter in module.parameters():
                    mark_group(parameter, unit.group)
    return chunks


def _release(chunks: Sequence[torch.nn.Module]) -> None:
    """Empty the modules, which no garbage collection would, and with them let go of the process groups.

    Megatron's dispatchers keep tensors of the last forward pass, these their graph, and the graph, outside Python's
    sight, the hooks of FSDP2 that hold the modules. And DTensor remembers the meshes of what it was asked for.
    """
    for module in [module for chunk in chunks for module in chunk.modules()]:
        vars(module).clear()
    _clear_fast_path_sharding_prop_cache()
    _clear_python_sharding_prop_cache()


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Inside it modules keep the shapes of their parameters only, whatever device they make them on."""

    def without_memory(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        empty = torch.empty_like(parameter, device="meta")
        return torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(without_memory)
    try:
        yield
    finally:
        handle.remove()


def _with_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device=device()) if tensor.is_meta else tensor


def _shard(chunk: Any, recompute: str) -> list[Unit]:
    """Shard the units of a chunk, and have each gathered a layer before it computes; returns them in order."""
    layers = [[unit for unit in _units(layer) if _is_spread(unit)] for layer in chunk.decoder.layers]
    first = _with_vocabulary([chunk.embedding.word_embeddings] if chunk.pre_process else [])
    last = _with_vocabulary([chunk.output_layer] if chunk.post_process else [])
    if chunk.pre_process and chunk.post_process and chunk.share_embeddings_and_output_weights:
        # the output layer computes with the embedding's weight, which stays gathered in between
        first, last = _with_vocabulary([chunk.embedding.word_embeddings, chunk.output_layer]), []
    units = [*first, *(unit for layer in layers for unit in layer), *last]
    for unit in units:
        mesh = DeviceMesh.from_group(unit.group, device().type)
        fully_shard(unit.modules, mesh=mesh, reshard_after_forward=True)
    # the root of the units: they share its streams, and the end of a backward pass is the end of the root's
    anywhere = DeviceMesh.from_group(_stage(), device().type)
    fully_shard(chunk, mesh=anywhere, ignored_params=set(chunk.parameters()))
    if chunk.post_process and chunk.share_embeddings_and_output_weights:
        holder = chunk.embedding.word_embeddings if chunk.pre_process else chunk.output_layer
        chunk.output_layer.register_forward_pre_hook(_takes_weight_of(holder), with_kwargs=True)
    _prefetch_in_forward(units, ahead=max(map(len, layers)))
    for unit, following in in_backward(_with_backward(chunk, layers, recompute), last, recompute):
        # with an empty list FSDP2 would guess, by the order of the forward passes, of several micro-batches at that
        _handle(unit).set_modules_to_backward_prefetch([_handle(one) for one in following or [unit]])
    return units


def _units(layer: Any) -> Iterator[Unit]:
    """What a layer runs, in order."""
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    yield Unit([layer.self_attention], copies, "attention")
    if not hasattr(layer.mlp, "frozen_experts"):
        yield Unit([layer.mlp], copies, "ffn")
        return
    yield Unit([layer.mlp.experts], parallel_state.get_expert_data_parallel_group(), "new experts")
    yield Unit(list(layer.mlp.frozen_experts), _stage(), "frozen experts")


def _with_vocabulary(modules: list[torch.nn.Module]) -> list[Unit]:
    unit = Unit(modules, parallel_state.get_data_parallel_group(with_context_parallel=True), "vocabulary")
    return [unit] if _is_spread(unit) else []


def _stage() -> dist.ProcessGroup:
    """The ranks of this rank's pipeline stage."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def _is_spread(unit: Unit) -> bool:
    """Whether it has weights, all of them frozen, and ranks to spread them over."""
    parameters = [parameter for module in unit.modules for parameter in module.parameters()]
    return bool(parameters) and not any(p.requires_grad for p in parameters) and unit.group.size() > 1


def _takes_weight_of(holder: torch.nn.Module) -> Callable:
    """Megatron hands a shared weight to the output layer, and has looked it up before it was gathered."""

    def exchange(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"weight": holder.weight}

    return exchange


def _prefetch_in_forward(units: Sequence[Unit], ahead: int) -> None:
    """Gather the next `ahead` units while one computes; not where a backward pass computes it again."""

    def prefetch(*following: FSDPModule) -> Callable:
        def gather(module: torch.nn.Module, args: tuple) -> None:
            if torch._C._current_graph_task_id() == -1:  # no backward pass is running
                for one in following:
                    one.unshard(async_op=True)

        return gather

    for unit, following in in_forward(units, ahead):
        if following:
            unit.modules[0].register_forward_pre_hook(prefetch(*map(_handle, following)))


def _with_backward(chunk: Any, layers: Sequence[Sequence[Unit]], recompute: str) -> Sequence[Sequence[Unit]]:
    """With recomputation all: the output of the embedding asks for a gradient then (builder.py)."""
    if not chunk.pre_process or recompute != "none":
        return layers
    lowest = next((n for n, layer in enumerate(chunk.decoder.layers) if hasattr(layer.mlp, "router")), len(layers))
    return with_backward(layers, lowest)


def _handle(unit: Unit) -> FSDPModule:
    """Any of its modules stands for all."""
    module = unit.modules[0]
    assert isinstance(module, FSDPModule)
    return module
