"""What rides through Megatron's model beside the hidden states: language tags and document numbers.

Megatron hands two arguments of a GPTModel to every layer of every pipeline stage, through recomputation too, and reads
neither: `padding_mask` comes to the MoE layers, `attention_mask` to the core attention. The tags take the place of the
first, the document numbers that of the second. Only this module knows. Shapes: B sequences, S positions.

    tags       int64: 0 padding, > 0 original language, < 0 expanded; language + 1 is the absolute value. None: nothing
               is collected and no loss is attached, as in inference.
    documents  None: attention is causal and no more. Else what `for_attention` makes of their numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributed import ProcessGroup


def passengers(tags_BS: Tensor | None, documents: Tensor | None = None) -> dict[str, Tensor | None]:
    """The keyword arguments of a GPTModel that carry both. The core attention gets the documents by position."""
    return {"padding_mask": tags_BS, "attention_mask": documents}


def for_attention(documents_BS: np.ndarray, *, te: bool, context_parallel: int) -> np.ndarray:
    """What the core attention knows documents by.

    torch's takes their numbers [B, S], of the whole sequence on every context-parallel rank. Transformer Engine's takes
    the places where they begin in the sequences laid end to end, and the end: int32 [K + 1] of K documents. These are
    found here, on the host: to find them on the device would be to wait for it.
    """
    if not te or context_parallel > 1:
        return documents_BS
    begins_BS = np.ones(documents_BS.shape, bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return np.append(np.flatnonzero(begins_BS), documents_BS.size).astype(np.int32)


def tags_of_layer(arguments: Mapping[str, Any], positions: int, group: ProcessGroup) -> Tensor | None:
    """The tags [S, B] of the positions that an MoE layer computes, out of the keyword arguments that it is called with.

    Of several pipeline stages the first has cut them for sequence parallelism already, the later ones have not.

    Args:
        positions: of this rank's hidden states.
        group: the tensor-parallel ranks, which share the sequence.
    """
    tags_BS = arguments.get("padding_mask")
    if tags_BS is None:
        return None
    tags_SB = tags_BS.transpose(0, 1)
    if len(tags_SB) != positions:
        assert len(tags_SB) == positions * group.size(), "tags and hidden states of other lengths"
        tags_SB = tags_SB[group.rank() * positions :][:positions]
    return tags_SB
