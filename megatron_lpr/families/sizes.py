"""Sizes in bytes: as users write them, and of models."""

import math

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, family_of
from megatron_lpr.files.safetensors_io import torch_dtype

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of '500MB' or '4GB' (decimal units, as Hugging Face counts).

    Raises:
        UserError: neither a number nor a number with a unit.
    """
    unit = text[-2:].upper()
    number, factor = (text[:-2], _UNITS[unit]) if unit in _UNITS else (text, 1)
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"max_shard_size: '{text}' is no size; write it as 500MB or 4GB")
    return size


def model_bytes(arch: Architecture, num_experts: int, dtype: str) -> int:
    """Bytes of all tensors on disk of a model with `num_experts` experts (0: dense)."""
    shapes = family_of(arch).shapes(arch, num_experts)
    return sum(map(math.prod, shapes.values())) * torch_dtype(dtype).itemsize
