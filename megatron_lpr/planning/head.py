"""What the last norm, the output layer and the loss hold and send of a micro-batch (model/output_layer.py)."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lpr.families.table import OUTPUT_LAYER
from megatron_lpr.model.loss_chunks import rows_at_once
from megatron_lpr.model.parameters import padded_vocab_size
from megatron_lpr.planning.activations import Activations
from megatron_lpr.planning.moves import Move

_FP32, _LABEL = 4, 8


@dataclass(frozen=True)
class Head:
    """Of a rank of the last pipeline stage."""

    activations: Activations

    @property
    def columns(self) -> int:
        """Of the vocabulary, on this rank."""
        tensor = self.activations.recipe.parallel.tensor
        return padded_vocab_size(self.activations.arch.vocab_size, tensor) // tensor

    @property
    def rows(self) -> int:
        """Tokens whose logits are there at once."""
        return rows_at_once(self.activations.wide_tokens, self.columns)

    @property
    def in_chunks(self) -> bool:
        return self.rows < self.activations.wide_tokens

    @property
    def learns(self) -> bool:
        return self.activations.learns(OUTPUT_LAYER)

    def saved(self) -> int:
        """The input of the norm, and of an output layer that learns; in chunks the gradient of the layer's input, which
        is computed with the loss, or all that the backward pass computes the logits from again."""
        own = self.activations
        if not self.in_chunks:
            return own.norm(True) + (own.hidden if self.learns else 0)
        kept = own.wide_hidden + own.wide_tokens * _LABEL if self.learns else own.wide_hidden
        return own.norm(True) + kept

    def logits(self) -> int:
        """Their softmax in fp32, with mask and targets; in chunks none outlives its chunk."""
        if self.in_chunks:
            return 0
        return self.activations.wide_tokens * (self.columns * _FP32 + 1 + _LABEL)

    def working(self) -> int:
        """The logits in the model's dtype or, in the backward pass, their gradient; of a chunk those in fp32 too."""
        size = self.activations.itemsize
        in_dtype = 0 if size == _FP32 else size
        if not self.in_chunks:
            return self.rows * self.columns * in_dtype
        of_weight = self.columns * self.activations.arch.hidden_size * _FP32 if self.learns else 0
        return self.rows * self.columns * (_FP32 + in_dtype) + of_weight

    def moves(self) -> Iterator[Move]:
        own = self.activations
        yield Move("all_gather", "tensor", own.hidden, 2 if self.learns and not self.in_chunks else 1)
        yield Move("reduce_scatter", "tensor", own.wide_hidden)
        if not self.in_chunks:
            # the largest logit, that of the label, and the sum
            yield Move("all_reduce", "tensor", own.wide_tokens * _FP32, 3)
            return
        times = 2 if self.learns else 1
        full, rest = divmod(own.wide_tokens, self.rows)
        for rows, chunks in ((self.rows, full), (rest, 1)):
            yield Move("all_reduce", "tensor", rows * _FP32, chunks * times)
            yield Move("all_reduce", "tensor", 2 * rows * _FP32, chunks * times)  # of the label, and the sum
