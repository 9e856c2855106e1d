"""Where the weights of a run come from."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_lpr.checkpoint.save_and_load import load_checkpoint
from megatron_lpr.conversion.load.upcycle import load_dense
from megatron_lpr.families import Architecture
from megatron_lpr.files.safetensors_io import SafetensorsReader
from megatron_lpr.recipe.settings import Recipe


def fill_weights(
    recipe: Recipe,
    arch: Architecture,
    chunks: list[torch.nn.Module],
    source: Path | None,
    progress: Callable[[int], object] = lambda filled_bytes: None,
) -> None:
    """Fill every parameter of this rank: from a checkpoint, or straight from the dense base model (upcycling it).

    progress: gets the bytes of each parameter that was filled from the base model.
    """
    if source is not None:
        load_checkpoint(source, chunks)
        return
    model = recipe.model
    reader = SafetensorsReader(model.base)
    for chunk in chunks:
        load_dense(
            _told(chunk.named_parameters(), progress),
            reader,
            arch,
            layer_offset=chunk.decoder.layers[0].layer_number - 1,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            ep_rank=parallel_state.get_expert_model_parallel_rank(),
            ep_size=parallel_state.get_expert_model_parallel_world_size(),
            etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
            etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
            num_frozen=model.num_frozen_experts if model.num_experts else 0,
            num_experts=model.num_experts,
            router_std=model.router_init_std,
            seed=model.router_init_seed,
        )


def _told(
    parameters: Iterable[tuple[str, torch.Tensor]], progress: Callable[[int], object]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in parameters:
        yield name, parameter
        progress(parameter.nbytes)
