"""Where the weights of a run come from, and the proof that frozen ones never change."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import torch

from megatron_lpr.checkpoint import checkpointing
from megatron_lpr.conversion.load.upcycle import load_dense
from megatron_lpr.families import Architecture
from megatron_lpr.files.file_tensor import tensor_bytes
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
        checkpointing.load(source, chunks)
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


def frozen_digest(chunks: Iterable[torch.nn.Module]) -> str:
    """SHA-256 over names and bytes of this rank's frozen parameters."""
    digest = hashlib.sha256()
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                digest.update(f"{index}.{name}".encode())
                digest.update(tensor_bytes(parameter))
    return digest.hexdigest()
