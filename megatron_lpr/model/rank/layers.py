"""The layers of a rank, by what is computed for them."""

from collections import Counter
from functools import cached_property
from typing import NamedTuple

from megatron_lpr.families import Architecture
from megatron_lpr.model.parameters import is_trainable
from megatron_lpr.model.rank.place import Place
from megatron_lpr.recipe.settings import Recipe, TrainConfig


class Kind(NamedTuple):
    """has_experts: in the model that trains. below_learns: the layer's input needs a gradient."""

    has_experts: bool
    below_learns: bool


class Layers:
    """Of each model chunk of a rank."""

    def __init__(self, recipe: Recipe, arch: Architecture, place: Place, train: TrainConfig) -> None:
        self.place = place
        self.chunks, self.last = place.chunks(arch), arch.num_layers - 1
        moe = set(arch.moe_layers()) if recipe.model.num_experts else set()
        self.has_experts = {layer: layer in moe for chunk in self.chunks for layer in chunk}
        # recomputation asks for a gradient at the embedding (model/builder.py)
        asked = train.recompute != "none" or is_trainable("embedding.", train.trainable)
        first_learner = min(moe, default=arch.num_layers)
        self.below_learns = {
            # another stage sends its states, and gets their gradient
            layer: asked or chunk[0] > 0 or layer > first_learner
            for chunk in self.chunks
            for layer in chunk
        }

    def kinds_of(self, chunk: int) -> Counter[Kind]:
        return Counter(Kind(self.has_experts[layer], self.below_learns[layer]) for layer in self.chunks[chunk])

    @cached_property
    def kinds(self) -> Counter[Kind]:
        """Of all chunks together."""
        return sum((self.kinds_of(chunk) for chunk in range(len(self.chunks))), Counter[Kind]())
