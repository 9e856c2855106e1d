"""A GPTModel whose loss knows which rows of the vocabulary are padding.

Shapes: B sequences, S positions, V columns of the (padded) vocabulary on this tensor-parallel rank.
"""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class TrueVocabGPTModel(GPTModel):
    """Megatron's GPTModel; rows that only pad the vocabulary are no tokens and take no probability.

    Without this each of them would count with a logit of 0, in the loss of training and evaluation, and there would
    be more of them at a larger tensor-parallel size.
    """

    def __init__(self, *args, true_vocab_size: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, S], logits [S, B, V] of this rank's columns -> token losses [B, S], fp32."""
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        # outside autograd: their softmax is 0 now, and so is their gradient
        logits.detach()[..., max(0, self.true_vocab_size - first) :].fill_(-torch.inf)
        return super().compute_language_model_loss(labels, logits)
