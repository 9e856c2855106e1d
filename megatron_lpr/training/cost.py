"""What a run costs, in closed form: parameters, bytes on the disk, floating-point operations of a step.

Operations are those of matrix products of weights (2 per multiply-add); attention scores are left out. A product
x W^T with n rows and a weight of m elements takes 2 n m operations forward, as many again for the gradient of x where
something below learns, and as many again for the gradient of W where W learns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_lpr.checkpoint.holding import CONTENTS, Content, holds
from megatron_lpr.families import Architecture
from megatron_lpr.model.loss_chunks import CHUNK_BYTES, rows_at_once
from megatron_lpr.model.parameters import is_trainable, itemsize, padded_vocab_size, parameter_sizes
from megatron_lpr.recipe.settings import ModelConfig, Recipe, Recompute


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
    """Operations of one step: what the model needs, and on top of it what saving memory takes."""

    forward: int
    input_gradients: int
    weight_gradients: int
    again: int  # products that are computed twice, and gradients that recomputation alone asks for

    @property
    def total(self) -> int:
        """That are needed."""
        return self.forward + self.input_gradients + self.weight_gradients

    @property
    def executed(self) -> int:
        return self.total + self.again


def step_flops(
    arch: Architecture,
    model: ModelConfig,
    trainable: str,
    *,
    tokens: int,
    frozen_slots: Sequence[int],
    vocab_size: int,
    recompute: Recompute = "none",
    logits_in_chunks: bool = False,
) -> StepFlops:
    """Operations of one step over `tokens` positions (padding included: it is computed too).

    Args:
        trainable: freezing policy.
        frozen_slots: per layer, the routing slots (of tokens * topk) that went to frozen experts.
        vocab_size: rows of the output layer, padding included.
        recompute: of the layers; `selective` computes experts again, of a dense model the FFNs.
        logits_in_chunks: as `logits_in_chunks` says; where the output layer learns they are computed again.
    """
    hidden = arch.hidden_size
    queries, keys = arch.shape("QK")
    everything, ffn_again, attention_again = trainable == "all", recompute != "none", recompute == "full"
    forward = inputs = weights = again = 0

    def product(rows: int, elements: int, *, below_learns: bool, learns: bool, twice: bool) -> None:
        nonlocal forward, inputs, weights, again
        operations = 2 * rows * elements
        forward += operations
        inputs += operations if below_learns else 0
        weights += operations if learns else 0
        # recomputation asks for a gradient at the embedding, whatever learns (model/builder.py)
        again += operations * (twice + (recompute != "none" and not below_learns))

    for layer in range(arch.num_layers):
        # does anything below this layer's FFN, or in the layers before, learn? The embedding does with everything.
        below = everything or any(layer > moe for moe in arch.moe_layers())
        in_attention = {"below_learns": below, "learns": everything, "twice": attention_again}
        product(tokens, (queries + 2 * keys) * hidden, **in_attention)
        product(tokens, queries * hidden, **in_attention)
        ffn = arch.ffn_hidden_size * hidden
        if not model.num_experts or layer in arch.mlp_only_layers:
            twice = attention_again if model.num_experts else ffn_again
            product(tokens, 3 * ffn, below_learns=below, learns=everything, twice=twice)
            continue
        product(tokens, model.num_experts * hidden, below_learns=below, learns=True, twice=ffn_again)
        # frozen experts are weighted by the router at their output: without learners below only their outputs count
        product(frozen_slots[layer], 3 * ffn, below_learns=below, learns=everything, twice=ffn_again)
        new_slots = tokens * model.topk - frozen_slots[layer]
        new_learns = is_trainable(".mlp.experts.", trainable)
        product(new_slots, 2 * ffn, below_learns=below, learns=new_learns, twice=ffn_again)
        # new experts are weighted by the router before fc2, so that its input gradient is always needed
        product(new_slots, ffn, below_learns=True, learns=new_learns, twice=ffn_again)
    product(tokens, vocab_size * hidden, below_learns=True, learns=everything, twice=everything and logits_in_chunks)
    return StepFlops(forward=forward, input_gradients=inputs, weight_gradients=weights, again=again)


def logits_in_chunks(recipe: Recipe, arch: Architecture) -> bool:
    """Whether the output layer takes the tokens of a micro-batch in parts (model/output_layer.py)."""
    assert recipe.train is not None and recipe.data is not None
    tokens = recipe.train.micro_batch_size * recipe.data.seq_length // recipe.parallel.context
    columns = padded_vocab_size(arch.vocab_size, recipe.parallel.tensor) // recipe.parallel.tensor
    return rows_at_once(tokens, columns, CHUNK_BYTES) < tokens
