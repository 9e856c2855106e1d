"""Where the weights of a run come from."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import torch

from megatron_lpr.checkpoint.load import load_checkpoint
from megatron_lpr.conversion.load.upcycle import load_dense
from megatron_lpr.families import Architecture
from megatron_lpr.files.safetensors_io import SafetensorsReader
from megatron_lpr.platform.place import RankPlace
from megatron_lpr.recipe.checks import expansion_of
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
    reader, place = SafetensorsReader(recipe.model.base), RankPlace.of_this_rank()
    for chunk in chunks:
        load_dense(
            _told(chunk.named_parameters(), progress),
            reader,
            arch,
            expansion_of(recipe.model),
            place=place,
            layer_offset=_first_layer(chunk),
        )


def _first_layer(chunk: torch.nn.Module) -> int:
    """Counted from 0 over the whole model."""
    return cast(int, chunk.get_submodule("decoder.layers.0").layer_number) - 1


def _told(
    parameters: Iterable[tuple[str, torch.Tensor]], progress: Callable[[int], object]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in parameters:
        yield name, parameter
        progress(parameter.nbytes)
