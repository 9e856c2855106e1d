"""One rank of a run, planned: what its memory holds, what its collectives carry, how long a step takes it at least."""

import importlib.util
from functools import cached_property

from megatron_lpr.families import Architecture
from megatron_lpr.files.safetensors_io import torch_dtype
from megatron_lpr.model.rank.casts import FP8, cast_bytes, has_no_other, layers_in_fp8
from megatron_lpr.model.rank.frozen import shards_frozen
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.parameters import Parameter, parameters
from megatron_lpr.model.rank.place import Place
from megatron_lpr.planning import memory, traffic, weight_traffic
from megatron_lpr.planning.activations import Activations, Device
from megatron_lpr.planning.amounts import RankMemory, Traffic
from megatron_lpr.planning.buffers import buckets
from megatron_lpr.planning.gathering import gathered_bytes
from megatron_lpr.planning.moves import Move, counted, repeated
from megatron_lpr.planning.schedule import micro_batches
from megatron_lpr.recipe.settings import Recipe, TrainConfig


def planned(
    recipe: Recipe, arch: Architecture, world_size: int, rank: int, device: Device = "cuda"
) -> tuple[RankMemory, Traffic]:
    """What a rank of a checked recipe holds at most, and what its collectives carry in a step.

    device: on a CPU the same modules save more.
    """
    one = PlannedRank(recipe, arch, world_size, rank)
    assert recipe.train is not None
    return one.memory(recipe.train, device), counted(one.moves(recipe.train))


class PlannedRank:
    """A rank of a layout; batch and recomputation may vary, and what does not depend on them is reckoned once."""

    def __init__(self, recipe: Recipe, arch: Architecture, world_size: int, rank: int) -> None:
        self.recipe, self.arch = recipe, arch
        self.place = Place(recipe.parallel, world_size, rank, shards_frozen(recipe, arch, world_size))
        self.chunks = parameters(recipe, arch, self.place)
        self.buckets = buckets(self.chunks, self.place, recipe.model.dtype)
        self.te = _with_transformer_engine(recipe)
        self._layers: dict[str, Layers] = {}
        self._gathered: dict[str, list[Move]] = {}
        self._whole: dict[str, int] = {}

    @cached_property
    def states(self) -> RankMemory:
        return memory.states(self.recipe, self.arch, self.chunks, self.buckets, self.place)

    @cached_property
    def _of_gradients(self) -> list[Move]:
        return weight_traffic.of_gradients(self.chunks, self.buckets, self.place)

    @cached_property
    def _in_fp8(self) -> range:
        return layers_in_fp8(self.recipe, self.arch)

    def _itemsize(self, parameter: Parameter) -> int:
        """Bytes of a number of a frozen parameter, as it is gathered."""
        if has_no_other(self.recipe, parameter, self._in_fp8):
            return FP8
        return torch_dtype(self.recipe.model.dtype).itemsize

    def layers(self, train: TrainConfig) -> Layers:
        if train.recompute not in self._layers:
            self._layers[train.recompute] = Layers(self.recipe, self.arch, self.place, train)
        return self._layers[train.recompute]

    def memory(self, train: TrainConfig, device: Device = "cuda") -> RankMemory:
        layers = self.layers(train)
        return (
            self.states
            + memory.of_batch(layers, self._activations(train, device))
            + RankMemory(
                gathered=self._gathered_bytes(train),
                casts=cast_bytes(self.recipe, self.chunks, layers, self.arch),
            )
        )

    def _gathered_bytes(self, train: TrainConfig) -> int:
        key = train.recompute
        if key not in self._whole:
            self._whole[key] = gathered_bytes(self.chunks, self.layers(train), key, self._itemsize)
        return self._whole[key]

    def moves(self, train: TrainConfig) -> list[Move]:
        layers, key = self.layers(train), train.recompute
        if key not in self._gathered:
            self._gathered[key] = weight_traffic.of_frozen_weights(layers, self.chunks, self._itemsize)
        return [
            *traffic.of_batch(layers, self._activations(train)),
            *repeated(self._gathered[key], micro_batches(train, self.place)),
            *self._of_gradients,
        ]

    def _activations(self, train: TrainConfig, device: Device = "cuda") -> Activations:
        return Activations(self.recipe, self.arch, train, device, te=self.te)


def _with_transformer_engine(recipe: Recipe) -> bool:
    """On the machine that trains. `auto` is planned as what is installed where it is planned, with a GPU or without."""
    if recipe.model.spec != "auto":
        return recipe.model.spec == "te"
    return recipe.fp8.recipe != "none" or importlib.util.find_spec("transformer_engine") is not None
