"""The weights that a checkpoint holds, as Megatron's sharded state."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_lpr.checkpoint.holding import Content, holds
from megatron_lpr.checkpoint.row_shards import sharded_state

Chunks = Sequence[torch.nn.Module]


def model_state(chunks: Chunks, content: Content = "whole") -> dict[str, Any]:
    """The parameters of this rank that a checkpoint of this content holds, each with its place in the whole tensor."""
    return {
        f"model{index}": {
            name: entry for name, entry in sharded_state(unwrap_model(chunk)).items() if holds(content, name)
        }
        for index, chunk in enumerate(chunks)
    }
