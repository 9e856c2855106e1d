"""How much of the sharded weights is whole at once: a micro-batch's gathering, unit for unit.

A unit is asked for ahead of its use, and what the collective returns is there from then on. Where it computes, FSDP2
copies its weights out of that (both are there for a moment), and lets go of them afterwards. Weights in FP8 have a
byte for each number, and in a backward pass another of the same transposed.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from packaging.version import Version

from megatron_lpr.families.table import EMBEDDING, OUTPUT_LAYER
from megatron_lpr.model import gather_order
from megatron_lpr.model.rank.casts import FP8
from megatron_lpr.model.rank.layers import Layers
from megatron_lpr.model.rank.parameters import Parameter
from megatron_lpr.model.rank.place import Place
from megatron_lpr.model.rank.shards import held_elements, is_spread, unit_name


@dataclass(eq=False)
class _Unit:
    """Bytes of its weights, whole and transposed; sent: of what the collective returns, the rows of all ranks padded
    alike.
    """

    kind: gather_order.Kind
    whole: int = 0
    transposed: int = 0
    sent: int = 0

    def add(self, parameter: Parameter, place: Place, itemsize: int) -> None:
        self.whole += parameter.elements * itemsize
        self.sent += held_elements(parameter, place) * place.size(parameter.copies) * itemsize
        if itemsize == FP8:
            self.transposed += parameter.elements


@dataclass
class _Held:
    """What is there at once, and the most that was.

    keeps_until_copied: what FSDP2 has waited for, until it has copied the next one too.
    """

    keeps_until_copied: bool
    peak: int = 0
    _sent: set[_Unit] = field(default_factory=set)
    _whole: dict[_Unit, int] = field(default_factory=dict)
    _late: int = 0

    def gather(self, unit: _Unit, following: Sequence[_Unit] = (), *, is_forward: bool = False) -> None:
        """Have a unit whole, which may be already, and those that follow on their way."""
        if unit not in self._whole:
            was_asked = unit in self._sent
            if not self.keeps_until_copied:
                self._late = 0
            self._sent.add(unit)
            self._whole[unit] = unit.whole if is_forward else unit.whole + unit.transposed
            self._note()
            self._sent.remove(unit)
            # of what it has waited for FSDP2 lets go when it comes to the next one
            self._late = unit.sent if is_forward and not was_asked else 0
        self._sent.update(one for one in following if one not in self._whole)
        self._note()

    def drop(self, unit: _Unit) -> None:
        del self._whole[unit]

    def _note(self) -> None:
        now = sum(unit.sent for unit in self._sent) + sum(self._whole.values())
        self.peak = max(self.peak, now + self._late)


def gathered_bytes(
    chunks: Sequence[Sequence[Parameter]], layers: Layers, recompute: str, itemsize: Callable[[Parameter], int]
) -> int:
    """Most bytes of gathered weights at once on a rank; its chunks compute one after another.

    itemsize: bytes of a number of a parameter.
    """
    return max(
        _of_chunk([p for p in parameters if is_spread(p, layers.place)], numbers, layers, recompute, itemsize)
        for parameters, numbers in zip(chunks, layers.chunks, strict=True)
    )


def _of_chunk(
    spread: Sequence[Parameter],
    numbers: range,
    layers: Layers,
    recompute: str,
    itemsize: Callable[[Parameter], int],
) -> int:
    units: dict[str, _Unit] = {}
    for parameter in spread:
        name = unit_name(parameter)
        units.setdefault(name, _Unit(_kind(name))).add(parameter, layers.place, itemsize(parameter))
    of_layers = [[unit for name, unit in units.items() if _layer(name) == number] for number in numbers]
    last = [units[OUTPUT_LAYER]] if OUTPUT_LAYER in units else []
    held = _Held(keeps_until_copied=Version(importlib.metadata.version("torch")) < Version("2.15.0.dev0"))
    # the output layer computes with the embedding's weight
    is_tied = EMBEDDING in units and numbers[-1] == layers.last and not last
    for unit, following in gather_order.in_forward([*units.values()], ahead=max(map(len, of_layers))):
        held.gather(unit, following, is_forward=True)
        if not (is_tied and unit.kind == "vocabulary"):
            held.drop(unit)
    lowest = sum(not layers.below_learns[number] for number in numbers) - 1
    backward = gather_order.with_backward(of_layers, lowest) if lowest >= 0 else of_layers
    following_of = dict(gather_order.in_backward(backward, last, recompute))
    for unit in last:
        held.gather(unit, following_of[unit])
        held.drop(unit)
    for layer in reversed(backward):
        if recompute != "none":
            for unit in gather_order.again_in_backward(layer, recompute):
                held.gather(unit)
        for unit in reversed(layer):
            held.gather(unit, following_of[unit])
            held.drop(unit)
    return held.peak


def _kind(name: str) -> gather_order.Kind:
    kinds: dict[str, gather_order.Kind] = {
        "self_attention": "attention",
        "mlp": "ffn",
        "experts": "new experts",
        "frozen_experts": "frozen experts",
    }
    return kinds[name.split(".")[-1]] if name.startswith("decoder.layers.") else "vocabulary"


def _layer(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
