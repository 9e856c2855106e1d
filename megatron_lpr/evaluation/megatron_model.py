"""Our own checkpoints (or the base model as Megatron runs it) in one process: token losses, logits, routing.

Import it after `platform.prepare()`. Shapes: B sequences, S positions, V vocabulary.
"""

import dataclasses

import torch
from torch import Tensor

from megatron_lpr.config import ParallelConfig, Recipe
from megatron_lpr.conversion.families import read_architecture
from megatron_lpr.conversion.origins import with_layers_kept_dense
from megatron_lpr.model.builder import build_model, init_model_parallel, routers
from megatron_lpr.model.router_stats import SLOTS, TOKENS
from megatron_lpr.platform import device
from megatron_lpr.training.run_state import checkpoint_folder, read_run_state
from megatron_lpr.training.weights import fill_weights


class MegatronModel:
    """A model on one rank, for evaluation and export: a checkpoint of any layout, or the upcycled base model."""

    def __init__(self, recipe: Recipe, checkpoint: str | None) -> None:
        """The base model's folder and dtype come from `recipe`, the experts from the checkpoint's own recipe."""
        source = checkpoint_folder(checkpoint) if checkpoint else None
        model = recipe.model
        if source:
            saved = read_run_state(source).recipe["model"]
            experts = {key: saved[key] for key in ("num_experts", "num_frozen_experts", "topk", "dtype")}
            layers = tuple(saved.get("mlp_only_layers", ()))
            model = dataclasses.replace(model, **experts, mlp_only_layers=layers)
        recipe = dataclasses.replace(recipe, model=model, parallel=ParallelConfig(), train=None)
        self.recipe = recipe
        self.arch = with_layers_kept_dense(read_architecture(model.base), model.mlp_only_layers)
        init_model_parallel(recipe.parallel)
        chunks = build_model(recipe, self.arch)
        fill_weights(recipe, self.arch, chunks, source)
        self.module = chunks[0].eval()
        if self.module.config.bf16:
            self.module.bfloat16()

    @torch.no_grad()
    def token_losses(self, tokens_BS: Tensor, labels_BS: Tensor, language: int | None = None) -> Tensor:
        """-ln p(label), fp32 [B, S]; `language` (an index) collects routing statistics of all tokens under it."""
        tags = None if language is None else torch.full_like(tokens_BS, language + 1).to(device())
        return self.module(
            tokens_BS.to(device()), None, None, labels=labels_BS.to(device()), padding_mask=tags
        ).float()

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V], without the padding of the vocabulary."""
        return self.module(tokens_BS.to(device()), None, None)[..., : self.arch.vocab_size]

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
