"""Our rotary frequencies against transformers' own, bit for bit."""

import pytest
import torch
from tiny_models import LLAMA3_SCALING, OTHER_LLAMA3_SCALING
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_lpr.model.rope import inverse_frequencies


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3_SCALING,
        OTHER_LLAMA3_SCALING,
        {**LLAMA3_SCALING, "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0},
    ],
    ids=["none", "linear", "llama3", "other_llama3", "fractions"],
)
@pytest.mark.parametrize("head_dim,theta", [(64, 1e4), (128, 5e5)])
def test_frequencies_of_transformers(scaling, head_dim, theta):
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072)
    assert torch.equal(inverse_frequencies(head_dim, theta, scaling), LlamaRotaryEmbedding(config).inv_freq)


def test_llama3_keeps_blends_and_stretches():
    plain, scaled = (inverse_frequencies(16, 1e4, scaling) for scaling in (None, OTHER_LLAMA3_SCALING))
    ratio = plain / scaled
    assert ratio[0] == 1 and ratio[-1] == 4 and ((ratio > 1) & (ratio < 4)).any()
