"""Everything about a recipe that can be wrong before any process group, GPU or file is taken."""

import importlib.util
import netrc
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture, read_architecture
from megatron_lpr.families.expansion import Expansion, check_upcycling, with_layers_kept_dense
from megatron_lpr.files.unexpanded import refuse_unexpanded
from megatron_lpr.platform.transformer_engine import lacking_for_transformer_engine
from megatron_lpr.recipe.fp8 import check_fp8, check_fp8_here
from megatron_lpr.recipe.layout import check_batch, check_layout, check_layout_here, check_seq_length
from megatron_lpr.recipe.sections import check_section
from megatron_lpr.recipe.settings import (
    BalanceConfig,
    DataConfig,
    LoggingConfig,
    LPRConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
)


def check_recipe(recipe: Recipe, arch: Architecture, world_size: int) -> None:
    """Check all settings for a run on `world_size` ranks, which need not be there: ranges, model, layout, training.

    Raises:
        UserError: names the field, the value and the nearest valid ones.
    """
    if world_size < 1:
        raise UserError(f"the number of ranks: {world_size}; at least 1")
    check_section(recipe)
    _check_experts(recipe)
    check_upcycling(arch, expansion_of(recipe.model))
    check_layout(recipe, arch, world_size)
    if recipe.train is not None:
        if recipe.data is None:
            raise UserError("data: missing; training needs data.manifest")
        _check_training(recipe, recipe.train, recipe.data)
        check_seq_length(recipe.data.seq_length, recipe.parallel, arch)
        check_batch(recipe.train, recipe.parallel, world_size)
        check_logging(recipe.logging, steps=recipe.train.steps, world_size=world_size)
    check_fp8(recipe, arch)


def check_machine(recipe: Recipe) -> None:
    """What the machine that does what a checked recipe says must have, and another need not. UserError."""
    use_transformer_engine(recipe.model.spec)
    check_fp8_here(recipe)
    check_layout_here(recipe)
    if recipe.train is not None:
        check_wandb_here(recipe.logging)


def check_preprocessing(recipe: Recipe) -> None:
    """What preprocessing needs to be told. UserError names the setting that is missing."""
    settings, base = recipe.preprocess, recipe.model.base
    if not settings.corpora:
        raise UserError("preprocess.corpora: empty; name at least one corpus")
    if settings.output is None:
        raise UserError("preprocess.output: missing; name the folder for the .bin/.idx files and manifest.yaml")
    if settings.tokenizer is None and not base:
        raise UserError("preprocess.tokenizer: missing; name a tokenizer folder, or that of the model as model.base")
    if settings.tokenizer is None and not Path(base).is_dir():
        refuse_unexpanded(base)
        raise UserError(
            f"model.base: {base}: no such folder, and preprocess.tokenizer is not set; name a folder for one of them"
        )


def use_transformer_engine(spec: str) -> bool:
    """Whether `model.spec` (auto, local or te) means Transformer Engine's modules here. UserError where they lack."""
    if spec == "local":
        return False
    lacking = lacking_for_transformer_engine()
    if lacking and spec == "te":
        raise UserError(f"model.spec: te {lacking}, or use local")
    return lacking is None


def expansion_of(model: ModelConfig) -> Expansion:
    """The expansion that a recipe asks for."""
    return Expansion(
        num_experts=model.num_experts,
        num_frozen=model.num_frozen_experts,
        topk=model.topk,
        mlp_only_layers=model.mlp_only_layers,
        router_std=model.router_init_std,
        router_seed=model.router_init_seed,
    )


def architecture_of(model: ModelConfig) -> Architecture:
    """That of a recipe's base, with the layers that the recipe keeps dense. UserError where it cannot be."""
    return with_layers_kept_dense(read_architecture(model.base), model.mlp_only_layers)


def _check_experts(recipe: Recipe) -> None:
    model, sizes = recipe.model, recipe.parallel
    if not model.num_experts:
        for field, value, neutral in (
            ("model.mlp_only_layers", model.mlp_only_layers, ()),
            ("parallel.expert", sizes.expert, 1),
            ("parallel.expert_tensor", sizes.expert_tensor, 1),
            ("parallel.overlap_frozen", sizes.overlap_frozen, "auto"),
            ("optimizer.router_lr", recipe.optimizer.router_lr, None),
            ("balance.coeff", recipe.balance.coeff, 0),
            ("lpr.coeff", recipe.lpr.coeff, 0),
        ):
            if value != neutral:
                raise UserError(f"{field}: {value} has no effect on a dense model (model.num_experts: 0)")
        return
    if model.num_frozen_experts >= model.num_experts:
        raise UserError(
            f"model.num_experts: {model.num_experts} leaves no new expert beside {model.num_frozen_experts} frozen: "
            f"at least {model.num_frozen_experts + 1}"
        )
    if model.topk > model.num_experts:
        raise UserError(f"model.topk: {model.topk} of {model.num_experts} experts; choose 1 to {model.num_experts}")


def _check_training(recipe: Recipe, train: TrainConfig, data: DataConfig) -> None:
    optimizer = recipe.optimizer
    if optimizer.warmup_steps >= train.steps:
        raise UserError(
            f"optimizer.warmup_steps: {optimizer.warmup_steps} of train.steps: {train.steps}; "
            f"choose 0 to {train.steps - 1}"
        )
    if optimizer.schedule == "constant" and optimizer.min_lr:
        raise UserError(
            f"optimizer.min_lr: {optimizer.min_lr:g} has no effect with optimizer.schedule: constant; set 0, or cosine "
            "or linear"
        )
    if train.trainable == "routers" and optimizer.router_lr is not None:
        raise UserError(
            f"optimizer.router_lr: {optimizer.router_lr:g} beside optimizer.lr, but nothing learns but the "
            "routers (train.trainable: routers); set optimizer.lr alone"
        )
    if train.trainable == "routers" and recipe.model.topk == 1 and not recipe.lpr.coeff and not recipe.balance.coeff:
        raise UserError(
            "model.topk: 1 gives a token's only expert the weight 1 whatever the routers say: they learn nothing of "
            "the next tokens, and nothing else learns (train.trainable: routers); set lpr.coeff, or topk: 2"
        )
    if train.on_not_finite == "stop" and train.max_skipped_steps != TrainConfig.max_skipped_steps:
        raise UserError(
            f"train.max_skipped_steps: {train.max_skipped_steps} has no effect with train.on_not_finite: stop; set "
            "skip or skip_and_mark, or leave it out"
        )
    if train.trainable != "all" and not recipe.model.num_experts:
        raise UserError(f"train.trainable: {train.trainable} needs experts; set model.num_experts, or trainable: all")
    if data.reset_attention and data.windows == "document":
        raise UserError("data.reset_attention: true has no effect on samples of one document (data.windows: document)")
    mixtures = [data.mixture, *(entry.mixture or {} for entry in data.schedule)]
    if recipe.lpr.coeff and not any(mixture.get("original") for mixture in mixtures):
        raise UserError(
            f"lpr.coeff: {recipe.lpr.coeff} without original-language data; the review needs a share of it, as "
            "data.mixture: {expanded: 0.5, original: 0.5}, and a corpus with role original in the manifest"
        )


def losses_left_out(recipe: Recipe) -> Iterator[str]:
    """Settings of losses that the recipe does not take; a file that both stages include may well have them."""
    for field, value, default, coeff in (
        ("balance.group", recipe.balance.group, BalanceConfig.group, recipe.balance.coeff),
        ("lpr.loss", recipe.lpr.loss, LPRConfig.loss, recipe.lpr.coeff),
    ):
        if value != default and not coeff:
            yield f"{field}: {value} has no effect while {field.partition('.')[0]}.coeff is 0"


def check_logging(logging: LoggingConfig, *, steps: int, world_size: int) -> None:
    """What a run of so many steps and ranks can log. UserError names the setting."""
    first, last = logging.profile_from, logging.profile_to
    if (first or last) and not 1 <= first <= last <= steps:
        raise UserError(
            f"logging.profile_from, profile_to: {first} to {last}; choose steps from 1 to train.steps ({steps}), the "
            "first before the last, or 0 for both"
        )
    if logging.profile_ranks != LoggingConfig.profile_ranks and not first:
        raise UserError(
            "logging.profile_ranks: has no effect without logging.profile_from; set the first and last step to trace"
        )
    if first and not logging.profile_ranks:
        raise UserError("logging.profile_ranks: empty, so that nothing is traced; name a rank, or set profile_from: 0")
    if beyond := [rank for rank in logging.profile_ranks if rank >= world_size and first]:
        raise UserError(f"logging.profile_ranks: {beyond[0]}, but the last rank of the run is {world_size - 1}")


def check_wandb_here(logging: LoggingConfig) -> None:
    """Whether Weights & Biases can be written to from here. UserError."""
    if logging.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"logging.wandb: {logging.wandb} needs the package wandb: pip install 'megatron-lpr[wandb]', or set off"
        )
    if logging.wandb == "online" and not _has_wandb_login():
        raise UserError(
            "logging.wandb: online without a login; call wandb login, set WANDB_API_KEY, or choose offline, which "
            "wandb sync uploads later"
        )


def _has_wandb_login() -> bool:
    """As W&B itself looks for one: in the environment, or in .netrc."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urllib.parse.urlsplit(url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return False
    return found is not None
