"""Our own checkpoints (or the base model as Megatron runs it): what texts cost, logits, routing.

Import it after `platform.prepare()`. Shapes: B sequences, S positions, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_lpr.checkpoint.own_recipe import with_experts_of
from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.evaluation.forward import text_nats
from megatron_lpr.evaluation.windows import Text
from megatron_lpr.families import Architecture
from megatron_lpr.model.builder import init_model_parallel, routers
from megatron_lpr.model.load.weights import fill_weights
from megatron_lpr.model.passengers import passengers
from megatron_lpr.model.router_stats import SLOTS, TOKENS
from megatron_lpr.model.sharding import build_frozen
from megatron_lpr.platform import device
from megatron_lpr.recipe.checks import architecture_of
from megatron_lpr.recipe.settings import ParallelConfig, Recipe

ONE_PROCESS = ParallelConfig()


class MegatronModel:
    """A model for evaluation, or this rank's part of it."""

    def __init__(
        self,
        recipe: Recipe,
        fill: Callable[[Recipe, Architecture, list[torch.nn.Module]], object],
        parallel: ParallelConfig = ONE_PROCESS,
    ) -> None:
        """The model of `recipe`, spread over all ranks by `parallel`; `fill` gives its chunks their weights."""
        self.recipe = recipe = dataclasses.replace(recipe, parallel=parallel, train=None)
        self.arch = architecture_of(recipe.model)
        init_model_parallel(recipe.parallel)
        self.chunks: list[Any] = build_frozen(recipe, self.arch)  # GPTModels, which ship no types
        fill(recipe, self.arch, self.chunks)
        for chunk in self.chunks:
            chunk.eval()
            if get_model_config(chunk).bf16:
                chunk.bfloat16()

    @classmethod
    def of_checkpoint(
        cls,
        recipe: Recipe,
        checkpoint: str,
        parallel: ParallelConfig = ONE_PROCESS,
        dtype: Literal["float32"] | None = None,
    ) -> "MegatronModel":
        """The base model's folder comes from `recipe`, experts and without `dtype` that from the checkpoint's own
        recipe. Any checkpoint's numbers are exact in float32."""
        source = checkpoint_folder(checkpoint)
        recipe = with_experts_of(recipe, source)
        if dtype:
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype=dtype))
        return cls(recipe, lambda recipe, arch, chunks: fill_weights(recipe, arch, chunks, source), parallel)

    @property
    def module(self) -> Any:
        """The whole model, in one process."""
        assert self.recipe.parallel.pipeline == 1
        return self.chunks[0]

    def nats(
        self, texts: Sequence[Text], progress: Callable[[int, int], None] = lambda done, windows: None
    ) -> list[float]:
        """The sum of -ln p over the scored tokens of each text; all ranks call it and get it.

        Where routing is collected, each text is a language of its own.
        """
        settings = self.recipe.evaluation
        return text_nats(
            self.chunks, texts, window=settings.window, batch=settings.batch, tagged=True, progress=progress
        )

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V], without the padding of the vocabulary; in one process."""
        return self.module(tokens_BS.to(device()), None, **passengers(None))[..., : self.arch.vocab_size]

    def frozen_shares(self) -> list[Tensor]:
        """Since the last call, per language index: share of routing slots in frozen experts, fp64 [layers].

        All ranks call it: each knows its own layers and its own tokens.
        """
        layers, model = self.arch.moe_layers(), self.recipe.model
        found = {router.layer_number - 1: router.stats for router in routers(*self.chunks)}
        if not model.num_experts:
            return []
        columns = SLOTS + model.num_experts
        empty_LC = torch.zeros(self._num_languages, columns, dtype=torch.float64, device=device())
        sums_LNC = torch.stack([found[layer].take()[0] if layer in found else empty_LC for layer in layers], dim=1)
        if dist.get_world_size() > 1:
            dist.all_reduce(sums_LNC)
        slots = sums_LNC[..., SLOTS : SLOTS + model.num_frozen_experts].sum(-1)
        return list((slots / (sums_LNC[..., TOKENS] * model.topk)).cpu())

    def collect_routing(self, num_languages: int) -> None:
        """Start collecting routing statistics of languages 0..num_languages-1."""
        self._num_languages = num_languages
        for router in routers(*self.chunks):
            router.stats.num_languages = num_languages
