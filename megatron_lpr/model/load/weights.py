"""Where the weights of a run come from: what a checkpoint does not hold, from the base or from another checkpoint."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from megatron_lpr.checkpoint.base_files import check_base_files, run_folder_of
from megatron_lpr.checkpoint.holding import holds
from megatron_lpr.checkpoint.load import load_checkpoint
from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.checkpoint.source import chain
from megatron_lpr.families import Architecture
from megatron_lpr.families.weights import open_weights
from megatron_lpr.model.load.row_shards import fill_row_shards
from megatron_lpr.model.load.upcycle import load_dense
from megatron_lpr.platform.place import RankPlace
from megatron_lpr.recipe.checks import expansion_of
from megatron_lpr.recipe.settings import Recipe

_Told = Callable[[int], object]


def fill_weights(
    recipe: Recipe,
    arch: Architecture,
    chunks: list[torch.nn.Module],
    source: Path | None,
    progress: _Told = lambda filled_bytes: None,
) -> int:
    """Fill every parameter of this rank: from a checkpoint, or straight from the dense base model (upcycling it).

    progress: gets the bytes of each parameter that was filled from the base model.

    Returns:
        Bytes that were read of the base model's tensors.
    """
    if source is None:
        return _fill_from_base(recipe, arch, chunks, lambda name: True, progress)
    read = fill_under(recipe, arch, chunks, source)
    load_checkpoint(source, chunks)
    return read


def fill_under(recipe: Recipe, arch: Architecture, chunks: list[torch.nn.Module], checkpoint: Path) -> int:
    """Fill what `load_checkpoint` leaves open: what `checkpoint` does not hold itself, from the checkpoints that it
    lies over and from the base, and this rank's rows of sharded weights.

    Returns:
        Bytes that were read of the base model's tensors.

    Raises:
        UserError: a checkpoint is not there, or the base is another one.
    """
    _, *below = chain(checkpoint, recipe.model.load)
    lowest = below[-1] if below else checkpoint
    state, read = read_run_state(lowest), 0
    if state.content == "over base":
        check_base_files(recipe.model.base, state.base, lowest, Path(recipe.output), run_folder_of(lowest))
        read = _fill_from_base(recipe, arch, chunks, lambda name: not holds(state.content, name))
    for folder in reversed(below):
        load_checkpoint(folder, chunks)
        fill_row_shards(folder, chunks, arch)
    fill_row_shards(checkpoint, chunks, arch)
    return read


def _fill_from_base(
    recipe: Recipe,
    arch: Architecture,
    chunks: list[torch.nn.Module],
    wanted: Callable[[str], bool],
    progress: _Told = lambda filled_bytes: None,
) -> int:
    reader, place = open_weights(recipe.model.base, arch), RankPlace.of_this_rank()
    for chunk in chunks:
        load_dense(
            _told(chunk.named_parameters(), progress),
            reader,
            arch,
            expansion_of(recipe.model),
            place=place,
            layer_offset=_first_layer(chunk),
            wanted=wanted,
            share=(dist.get_rank(), dist.get_world_size()),
        )
    return reader.bytes_read


def _first_layer(chunk: torch.nn.Module) -> int:
    """Counted from 0 over the whole model."""
    return cast(int, chunk.get_submodule("decoder.layers.0").layer_number) - 1


def _told(parameters: Iterable[tuple[str, torch.Tensor]], progress: _Told) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in parameters:
        yield name, parameter
        progress(parameter.nbytes)
