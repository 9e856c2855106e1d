"""The FP8 copies of weights that a trainer's modules hold."""

import torch


def is_quantised(weight: torch.Tensor) -> bool:
    return hasattr(weight, "get_data_tensors")


def bytes_of_casts(trainer) -> int:
    """Of all FP8 copies of weights that the modules keep, scales included."""
    copies = [p for p in trainer.chunks[0].parameters() if is_quantised(p)]
    for module in trainer.chunks[0].modules():
        copies += getattr(module, "_fp8_workspaces", {}).values()
    parts = [part for copy in copies for part in copy.get_metadata().values() if isinstance(part, torch.Tensor)]
    return sum(part.nbytes for part in parts)
