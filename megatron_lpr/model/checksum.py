"""A checksum of a tensor's bits, computed where the tensor lies: has it changed, is it the same on two ranks?

The bits are read as 32-bit words, and summed modulo 2^64, each times an odd number that depends on its place. An odd
number has an inverse there, so that a change inside one word, one flipped bit, always changes the sum; and even the
highest bit of a word meets 33 bits of that number, so that changes of two words hardly ever cancel out. Sums modulo
2^64 do not depend on their order: every device gets the same. It protects from accidents, not from an attacker.
"""

from collections.abc import Iterable
from typing import Any

import torch

_CHUNK_WORDS = 1 << 19  # 2 MiB of a tensor at a time; the factors and the products take 4 MiB each
_STRIDE = 0x1E3779B97F4A7C15
_NEXT_CHUNK = 0x2545F4914F6CDD1D


@torch.no_grad()
def tensor_checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The checksum of a tensor's bits in row-major order, int64 [] on its device; the host does not wait for it."""
    words, tail = _words(tensor)
    factors = _factors(min(_CHUNK_WORDS, max(words.numel(), 1)), tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in (*words.split(_CHUNK_WORDS), tail):
        total = total * _NEXT_CHUNK + (chunk * factors[: chunk.numel()]).sum()
    return total


def tensor_checksums(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The checksums of some tensors of one device, int64 [number of tensors] there."""
    found = [
        _quantised_checksum(tensor) if hasattr(tensor, "get_data_tensors") else tensor_checksum(tensor)
        for tensor in tensors
    ]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64)


def _quantised_checksum(weight: Any) -> torch.Tensor:
    """Of the FP8 values of a weight of Transformer Engine, which may lie there transposed too, and of their scales.

    It is the same with the transposed values and without: they come when a backward pass first asks for them.
    """
    values, transposed = weight.get_data_tensors()
    total = tensor_checksum(values)
    if transposed is not None:
        total = total + (tensor_checksum(transposed.T) - total) * _STRIDE
    about = weight.get_metadata()
    scales = next(about[name] for name in ("fp8_scale_inv", "rowwise_scale_inv") if name in about)
    return total * _NEXT_CHUNK + tensor_checksum(scales)


def _words(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits as int32: whole words, and up to three bytes that are left, filled up with zeros."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()  # a word has to start at a multiple of its size
    octets = flat.view(torch.uint8)
    whole = octets.numel() // 4 * 4
    tail = octets.new_zeros(4 if whole < octets.numel() else 0)
    tail[: octets.numel() - whole] = octets[whole:]
    return octets[:whole].view(torch.int32), tail.view(torch.int32)


def _factors(number: int, device: torch.device) -> torch.Tensor:
    """Odd numbers, each another."""
    return torch.arange(number, dtype=torch.int64, device=device) * (2 * _STRIDE) + 1
