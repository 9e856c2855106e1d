"""Frozen weights stay what they were."""

import hashlib
from collections.abc import Iterable

import torch

from megatron_lpr.files.file_tensor import tensor_bytes
from megatron_lpr.training.hooks.hook import Hook, RunningTrainer


class FrozenWeights(Hook):
    """A frozen weight that is not what it was when the trainer was built is a bug, and nothing is saved with it."""

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        self.before = fingerprint(chunks)

    def before_save(self, trainer: RunningTrainer) -> None:
        assert fingerprint(trainer.chunks) == self.before, "a frozen weight has changed"


def fingerprint(chunks: Iterable[torch.nn.Module]) -> str:
    """SHA-256 over names and bytes of this rank's frozen parameters."""
    digest = hashlib.sha256()
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                digest.update(f"{index}.{name}".encode())
                digest.update(tensor_bytes(parameter))
    return digest.hexdigest()
