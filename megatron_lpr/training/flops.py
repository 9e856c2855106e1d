"""How many floating-point operations a training step takes, in closed form.

Matrix products of weights only (2 operations per multiply-add); attention scores are left out. A product x W^T with n
rows and a weight of m elements takes 2 n m operations forward, as many again for the gradient of x where something
below learns, and as many again for the gradient of W where W learns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lpr.families import Architecture
from megatron_lpr.model.freezing import is_trainable
from megatron_lpr.recipe.settings import ModelConfig


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
