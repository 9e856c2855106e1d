"""A GPTModel whose loss knows which rows of the vocabulary are padding.

Shapes: B sequences, S positions, V columns of the (padded) vocabulary on this tensor-parallel rank.
"""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_lpr.model.output_layer import OutputLayer


class TrueVocabGPTModel(GPTModel):
    """Megatron's GPTModel; rows that only pad the vocabulary are no tokens and take no probability.

    Without this each of them would count with a logit of 0, in the loss of training and evaluation, and there would
    be more of them at a larger tensor-parallel size.
    """

    def __init__(self, *args, true_vocab_size: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size
        if self.post_process:
            self.output_layer.__class__ = OutputLayer  # Megatron has no other place to say so
            self.output_layer.true_vocab_size = true_vocab_size

    def forward(self, *args, labels: Tensor | None = None, **kwargs) -> Tensor:
        """As Megatron's; with labels [B, S] token losses [B, S], fp32."""
        if not self.post_process:
            return super().forward(*args, labels=labels, **kwargs)
        self.output_layer.labels_BS = labels
        try:
            return super().forward(*args, labels=labels, **kwargs)
        finally:
            self.output_layer.labels_BS = None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, S], logits [S, B, V] of this rank, or the losses themselves -> token losses [B, S] in fp32."""
        if logits.ndim == 2:
            return logits
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        # outside autograd: their softmax is 0 now, and so is their gradient
        logits.detach()[..., max(0, self.true_vocab_size - first) :].fill_(-torch.inf)
        return super().compute_language_model_loss(labels, logits)
