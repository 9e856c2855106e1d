"""Rotary frequencies as transformers computes them, scaled or not.

Megatron's RotaryEmbedding knows Llama 3's scaling with fixed constants only; it takes these instead.
"""

import math
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Radians per position of each pair of channels, fp32 [head_dim / 2].

    scaling: None, or as `read_rope` gives it. `linear` stretches all positions (arXiv 2306.15595); `llama3` stretches
    long wavelengths, keeps short ones and blends in between (arXiv 2407.21783; transformers' modeling_rope_utils).
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    assert scaling["rope_type"] == "llama3", scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # turns that each pair of channels makes within the original context
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling["factor"] + blend * frequencies
