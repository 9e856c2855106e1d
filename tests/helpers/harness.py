"""Trainers on batches that a test chooses, instead of the sampler's, and what the tests look at in them."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from manifest_entries import entry, tokenizer_record
from torch import Tensor

from megatron_lpr.checkpoint.same_run import base_identity
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.replay_sampler import Batch, BatchCounts
from megatron_lpr.families import Architecture
from megatron_lpr.recipe.checks import architecture_of
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.plan import Plan

# index of a language + 1 is its tag, negative for an expanded language
ROLES = {"qaa": "expanded", "qab": "original", "qac": "original"}
EXPANDED, ORIGINAL, OTHER_ORIGINAL, PADDING = -1, 2, 3, 0


def make_batch(rows: list[list[tuple[int, int]]], *, vocab_size: int = 257, seed: int = 0) -> Batch:
    """A batch of random tokens; each row is a list of (tag, number of positions) in order."""
    tags = np.array([[tag for tag, length in row for _ in range(length)] for row in rows], dtype=np.int64)
    tokens, labels = np.random.default_rng(seed).integers(1, vocab_size, (2, *tags.shape))
    valid = tags != PADDING
    return Batch(
        tokens_BS=np.where(valid, tokens, 0),
        labels_BS=np.where(valid, labels, 0),
        loss_mask_BS=valid.astype(np.float32),
        tags_BS=tags,
    )


def mixed_batch(length: int = 16) -> Batch:
    """Four sequences that make any mean per micro-batch or sequence differ from the mean over the batch."""
    return make_batch(
        [
            [(EXPANDED, length)],
            [(ORIGINAL, 3), (PADDING, length - 3)],
            [(OTHER_ORIGINAL, length)],
            [(EXPANDED, 5), (ORIGINAL, 4), (PADDING, length - 9)],
        ]
    )


class FixedSampler:
    """Stands in for the ReplaySampler: every step reads the same global batch."""

    mixtures = ()
    manifest = SimpleNamespace(corpora=())

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def epochs_before(self, samples: int) -> list[float]:
        return []

    def count(self, first: int, count: int) -> BatchCounts:
        tags = self._rows(first, count).tags_BS
        return BatchCounts(
            tokens=int((tags != PADDING).sum()),
            original_tokens=int((tags > 0).sum()),
            tokens_per_language={
                language: int((np.abs(tags) == index).sum()) for index, language in enumerate(ROLES, start=1)
            },
        )

    def fill(self, first: int, count: int) -> Batch:
        return self._rows(first, count)

    def batches(self, first: int, count: int, stride: int, *, read_ahead: int = 0) -> Iterator[Batch]:
        for i in itertools.count():
            yield self.fill(first + i * stride, count)

    def state(self, consumed_samples: int) -> dict:
        return {"version": 3, "consumed_samples": consumed_samples, "schedule": [], "corpora": {}}

    def _rows(self, first: int, count: int) -> Batch:
        rows = np.arange(first, first + count) % len(self.batch.tags_BS)
        return Batch(**{name: array[rows] for name, array in vars(self.batch).items() if array is not None})


def make_recipe(base: Path, batch: Batch, output: Path, sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """A one-step recipe over the whole of `batch`; `sections` go on top."""
    samples, length = batch.tokens_BS.shape
    tree: dict[str, dict[str, Any]] = {
        "model": {"base": str(base), "num_experts": 4},
        "data": {"manifest": "none", "seq_length": length},
        "train": {"trainable": "all", "steps": 10, "global_batch_size": samples, "micro_batch_size": samples},
        "optimizer": {"clip_grad": 1e9},  # the norm is taken, nothing is clipped
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | dict(section)
    return from_tree(Recipe, {"name": "test", "output": str(output), **tree}, where="test")


def make_plan(recipe: Recipe, batch: Batch, *, world_size: int = 1, source: Path | None = None) -> Plan:
    """A plan that reads `batch` in every step."""
    corpora = tuple(entry(language, role, tokens=1) for language, role in ROLES.items())
    tokenizer = tokenizer_record(257)
    arch = architecture_of(recipe.model)
    return Plan(
        recipe=recipe,
        arch=arch,
        base=base_identity(recipe.model.base, arch),
        manifest=Manifest(path="none", tokenizer=tokenizer, corpora=corpora),
        sampler=FixedSampler(batch),
        world_size=world_size,
        source=source,
        resume=None,
        state=None,
    )


def make_trainer(base: Path, tmp_path: Path, **sections: Mapping[str, Any]):
    """A trainer, ready for a step, that reads `mixed_batch()` in every one."""
    from megatron_lpr.training.train import Trainer

    batch = mixed_batch()
    trainer = Trainer(make_plan(make_recipe(base, batch, tmp_path, sections), batch))
    for chunk in trainer.chunks:
        chunk.train()
    return trainer


def scramble(module: torch.nn.Module, *, seed: int = 0) -> None:
    """Give every expert its own weights and the routers clear opinions: nothing may hide behind equal experts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".mlp.router." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "experts." in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter.device))


def upcycle_base(recipe: Recipe, arch: Architecture, chunks: list[torch.nn.Module]) -> None:
    """The base model upcycled, as the weights of a `MegatronModel`."""
    from megatron_lpr.model.load.weights import fill_weights

    fill_weights(recipe, arch, chunks, None)


def unwrapped(trainer) -> torch.nn.Module:
    """The GPTModel of a trainer with one chunk."""
    module = trainer.chunks[0]
    while hasattr(module, "module"):
        module = module.module
    return module


def gradients(trainer) -> dict[str, Tensor]:
    """Accumulated gradients of the trainable parameters after a step, by Megatron's names."""
    return {name: p.main_grad for name, p in unwrapped(trainer).named_parameters() if p.requires_grad}


def as_tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in vars(batch).items() if array is not None}


def reference_sizes(arch: Architecture, recipe: Recipe):
    """The sizes of a recipe's model for the plain PyTorch reference."""
    from reference import Sizes

    return Sizes(
        num_layers=arch.num_layers,
        num_heads=arch.num_attention_heads,
        num_groups=arch.num_query_groups,
        head_dim=arch.head_dim,
        vocab_size=arch.vocab_size,
        eps=arch.rms_norm_eps,
        rope_theta=arch.rope_theta,
        num_experts=recipe.model.num_experts or 1,
        num_frozen=recipe.model.num_frozen_experts,
        topk=recipe.model.topk if recipe.model.num_experts else 1,
    )
