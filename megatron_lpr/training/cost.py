"""What a run costs, in closed form: parameters, bytes on the disk, floating-point operations of a step.

Operations are those of matrix products of weights (2 per multiply-add); attention scores are left out. A product
x W^T with n rows and a weight of m elements takes 2 n m operations forward, as many again for the gradient of x where
something below learns, and as many again for the gradient of W where W learns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_lpr.checkpoint.holding import CONTENTS, Content, holds
from megatron_lpr.families import Architecture
from megatron_lpr.model.parameters import is_trainable, itemsize, padded_vocab_size, parameter_sizes
from megatron_lpr.recipe.settings import ModelConfig, Recipe


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameters of the whole model, each counted once on however many ranks, and bytes of its checkpoints."""

    trainable: int
    frozen: int
    weight_bytes: Mapping[Content, int]
    optimizer_bytes: int

    def checkpoint_bytes(self, content: Content) -> int:
        """Of a checkpoint from which the run can go on; one without optimizer state has `weight_bytes`."""
        return self.weight_bytes[content] + self.optimizer_bytes


def model_size(recipe: Recipe, arch: Architecture) -> ModelSize:
    """The size of a recipe's model, from numbers alone."""
    model, sizes = recipe.model, recipe.parallel
    elements, held, optimizer = {True: 0, False: 0}, dict.fromkeys(CONTENTS, 0), 0
    for name, size in parameter_sizes(
        arch,
        num_experts=model.num_experts,
        num_frozen=model.num_frozen_experts,
        vocab_size=padded_vocab_size(arch.vocab_size, sizes.tensor),
    ):
        learns = recipe.train is not None and is_trainable(name, recipe.train.trainable)
        each = itemsize(name, model.dtype)
        elements[learns] += size
        # AdamW's two moments, and the weight where the model's is not fp32 itself
        optimizer += learns * size * 4 * (2 if each == 4 else 3)
        for content in CONTENTS:
            held[content] += size * each * holds(content, name)
    return ModelSize(trainable=elements[True], frozen=elements[False], weight_bytes=held, optimizer_bytes=optimizer)


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of one step."""

    forward: int
    input_gradients: int
    weight_gradients: int

    @property
    def total(self) -> int:
        return self.forward + self.input_gradients + self.weight_gradients


def step_flops(
    arch: Architecture,
    model: ModelConfig,
    trainable: str,
    *,
    tokens: int,
    frozen_slots: Sequence[int],
    vocab_size: int,
) -> StepFlops:
    """Operations of one step over `tokens` positions (padding included: it is computed too).

    Args:
        trainable: freezing policy.
        frozen_slots: per layer, the routing slots (of tokens * topk) that went to frozen experts.
        vocab_size: rows of the output layer, padding included.
    """
    hidden = arch.hidden_size
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    everything = trainable == "all"
    forward = inputs = weights = 0

    def product(rows: int, elements: int, *, below_learns: bool, learns: bool) -> None:
        nonlocal forward, inputs, weights
        operations = 2 * rows * elements
        forward += operations
        inputs += operations if below_learns else 0
        weights += operations if learns else 0

    for layer in range(arch.num_layers):
        # does anything below this layer's FFN, or in the layers before, learn? The embedding does with everything.
        below = everything or any(layer > moe for moe in arch.moe_layers())
        product(tokens, (queries + 2 * keys) * hidden, below_learns=below, learns=everything)
        product(tokens, queries * hidden, below_learns=below, learns=everything)
        ffn = arch.ffn_hidden_size * hidden
        if not model.num_experts or layer in arch.mlp_only_layers:
            product(tokens, 3 * ffn, below_learns=below, learns=everything)
            continue
        product(tokens, model.num_experts * hidden, below_learns=below, learns=True)
        # frozen experts are weighted by the router at their output: without learners below only their outputs count
        product(frozen_slots[layer], 3 * ffn, below_learns=below, learns=everything)
        new_slots = tokens * model.topk - frozen_slots[layer]
        new_learns = is_trainable(".mlp.experts.", trainable)
        product(new_slots, 2 * ffn, below_learns=below, learns=new_learns)
        # new experts are weighted by the router before fc2, so that its input gradient is always needed
        product(new_slots, ffn, below_learns=True, learns=new_learns)
    product(tokens, vocab_size * hidden, below_learns=True, learns=everything)
    return StepFlops(forward=forward, input_gradients=inputs, weight_gradients=weights)
