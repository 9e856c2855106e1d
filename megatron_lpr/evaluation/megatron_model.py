"""Our own checkpoints (or the base model as Megatron runs it) in one process: token losses, logits, routing.

Import it after `platform.prepare()`. Shapes: B sequences, S positions, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lpr.checkpoint.run_state import checkpoint_folder, read_run_state
from megatron_lpr.families import Architecture, read_architecture
from megatron_lpr.families.expansion import with_layers_kept_dense
from megatron_lpr.model.builder import build_model, init_model_parallel, routers
from megatron_lpr.model.load.weights import fill_weights
from megatron_lpr.model.passengers import passengers
from megatron_lpr.model.router_stats import SLOTS, TOKENS
from megatron_lpr.platform import device
from megatron_lpr.recipe.settings import ParallelConfig, Recipe


class MegatronModel:
    """A model on one rank, for evaluation and export."""

    def __init__(self, recipe: Recipe, fill: Callable[[Recipe, Architecture, list[torch.nn.Module]], object]) -> None:
        """The model of `recipe`, in this process alone; `fill` gives its chunks their weights."""
        self.recipe = recipe = dataclasses.replace(recipe, parallel=ParallelConfig(), train=None)
        self.arch = with_layers_kept_dense(read_architecture(recipe.model.base), recipe.model.mlp_only_layers)
        init_model_parallel(recipe.parallel)
        chunks: list[Any] = build_model(recipe, self.arch)  # GPTModels, which ship no types
        fill(recipe, self.arch, chunks)
        self.module = chunks[0].eval()
        if self.module.config.bf16:
            self.module.bfloat16()

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, checkpoint: str) -> "MegatronModel":
        """The base model's folder comes from `recipe`, experts and dtype from the checkpoint's own recipe."""
        source = checkpoint_folder(checkpoint)
        saved = read_run_state(source).recipe["model"]
        experts = {key: saved[key] for key in ("num_experts", "num_frozen_experts", "topk", "dtype")}
        layers = tuple(saved.get("mlp_only_layers", ()))
        model = dataclasses.replace(recipe.model, **experts, mlp_only_layers=layers)
        recipe = dataclasses.replace(recipe, model=model)
        return cls(recipe, lambda recipe, arch, chunks: fill_weights(recipe, arch, chunks, source))

    @torch.no_grad()
    def token_losses(self, tokens_BS: Tensor, labels_BS: Tensor, language: int | None = None) -> Tensor:
        """-ln p(label), fp32 [B, S]; `language` (an index) collects routing statistics of all tokens under it."""
        tags = None if language is None else torch.full_like(tokens_BS, language + 1).to(device())
        return self.module(tokens_BS.to(device()), None, labels=labels_BS.to(device()), **passengers(tags)).float()

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V], without the padding of the vocabulary."""
        return self.module(tokens_BS.to(device()), None, **passengers(None))[..., : self.arch.vocab_size]

    def frozen_shares(self) -> list[Tensor]:
        """Since the last call, per language index: share of routing slots in frozen experts, fp64 [layers]."""
        layers = [router.stats.take()[0].cpu() for router in routers(self.module)]
        if not layers:
            return []
        sums_LNC = torch.stack(layers, dim=1)
        slots = sums_LNC[..., SLOTS : SLOTS + self.recipe.model.num_frozen_experts].sum(-1)
        return list(slots / (sums_LNC[..., TOKENS] * self.recipe.model.topk))

    def collect_routing(self, num_languages: int) -> None:
        """Start collecting routing statistics of languages 0..num_languages-1."""
        for router in routers(self.module):
            router.stats.num_languages = num_languages
