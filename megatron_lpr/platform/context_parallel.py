"""How context parallelism divides a sequence, as Megatron and Transformer Engine's attention do it.

A sequence is cut into 2 * size chunks of one length. Rank r has the chunks r and 2 * size - 1 - r, in this order: with
a causal mask that is the same work for every rank. Megatron's rotary embedding counts positions accordingly.
"""

import numpy as np
import torch
from torch import Tensor


def rank_chunks(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of a rank, of 2 * size."""
    return rank, 2 * size - 1 - rank


def rank_positions(x_BS: np.ndarray, rank: int, size: int) -> np.ndarray:
    """The columns [B, S / size] of a rank, of the whole [B, S]; the array itself where there is one rank."""
    if size == 1:
        return x_BS
    batch, length = x_BS.shape
    return x_BS.reshape(batch, 2 * size, -1)[:, rank_chunks(rank, size)].reshape(batch, length // size)


def in_order(gathered: Tensor, size: int) -> Tensor:
    """[S, ...], the positions of rank 0, then of rank 1, ... -> the same positions in the order of the sequence."""
    held = [chunk for rank in range(size) for chunk in rank_chunks(rank, size)]
    pieces = gathered.chunk(len(held))
    return torch.cat([pieces[held.index(chunk)] for chunk in range(len(held))])
