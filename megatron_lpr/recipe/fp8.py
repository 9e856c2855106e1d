"""FP8: which settings go together, and which shapes Transformer Engine's 8-bit products take."""

import importlib.metadata

from packaging.version import Version

from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.platform.fp8 import lacking_for_fp8
from megatron_lpr.recipe.layout import nearest_multiples
from megatron_lpr.recipe.settings import Fp8Config, Recipe, TrainConfig

_ROWS = {"mxfp8": 32}  # operands of a product have multiples of so many rows and columns; with other recipes of 16
_BLOCK = 128  # numbers that share a scale with blockwise


def check_fp8(recipe: Recipe, arch: Architecture) -> None:
    """What can be told of `fp8` on any machine.

    Raises:
        UserError: a setting without effect, or one that FP8 cannot go with; a size that no FP8 product takes, with the
            nearest that do.
    """
    settings = recipe.fp8
    if settings.recipe == "none":
        for name in ("format", "bf16_layers_at_start", "bf16_layers_at_end", "frozen_weights"):
            if (value := getattr(settings, name)) != getattr(Fp8Config, name):
                raise UserError(
                    f"fp8.{name}: {value} has no effect with fp8.recipe: none; set tensorwise or blockwise, or leave "
                    "it out"
                )
        return
    if recipe.train is None:  # nothing is trained, so that nothing is computed in FP8
        return
    if recipe.model.spec == "local":
        raise UserError(
            f"fp8.recipe: {settings.recipe} computes with Transformer Engine's layers; set model.spec: te, or none"
        )
    if recipe.model.dtype != "bfloat16":
        raise UserError(
            f"fp8.recipe: {settings.recipe} needs model.dtype: bfloat16 (it is {recipe.model.dtype}); set that, or none"
        )
    if settings.frozen_weights == "fp8":
        _check_frozen(recipe, recipe.train)
    _check_bf16_layers(settings, arch, recipe.parallel.pipeline)
    _check_widths(recipe, arch)
    _check_tokens(recipe)


def check_fp8_here(recipe: Recipe) -> None:
    """Whether the machine that trains can compute with the recipe's FP8, by its GPU, CUDA and Transformer Engine.

    Raises:
        UserError: what it lacks, and what to set instead.
    """
    wanted = recipe.fp8.recipe
    if wanted == "none" or recipe.train is None:
        return
    if lacking := lacking_for_fp8(wanted):
        others = "none" if wanted == "tensorwise" or lacking_for_fp8("tensorwise") else "tensorwise or none"
        raise UserError(f"fp8.recipe: {wanted} does not run here ({lacking}); set {others}")


def lacking_to_shard(settings: Fp8Config) -> str | None:
    """Why frozen weights that are held in FP8 cannot be sharded; None where they can, or are held in bfloat16."""
    if settings.frozen_weights != "fp8":
        return None
    if settings.recipe != "tensorwise":
        return f"of {settings.recipe}'s scales a rank would need whole blocks of rows; tensorwise has one for a weight"
    if _is_before("2.10"):
        return "Transformer Engine before 2.10 has no quantised tensors that FSDP2 can gather"
    return None


def _check_frozen(recipe: Recipe, train: TrainConfig) -> None:
    """Of weights that are quantised no checkpoint can be written."""
    if train.trainable == "all":
        raise UserError(
            "fp8.frozen_weights: fp8 has no effect with train.trainable: all, which freezes nothing; leave it out"
        )
    if recipe.checkpoint.whole:
        raise UserError(
            "checkpoint.whole: true writes frozen weights, of which fp8.frozen_weights: fp8 keeps rounded values only; "
            "leave one of them out"
        )
    if train.trainable == "routers" and not recipe.model.load:
        raise UserError(
            "fp8.frozen_weights: fp8 with train.trainable: routers needs model.load, the checkpoint that holds the new "
            "experts as they are; name it, or set bf16"
        )


def _check_bf16_layers(settings: Fp8Config, arch: Architecture, pipeline: int) -> None:
    share = arch.num_layers // pipeline  # Megatron has no more of them in bfloat16 at either end
    for name in ("bf16_layers_at_start", "bf16_layers_at_end"):
        if (layers := getattr(settings, name)) > share:
            of = "the model's layers" if pipeline == 1 else "layers / parallel.pipeline"
            raise UserError(f"fp8.{name}: {layers}; at most {share}, {of}")
    if settings.bf16_layers_at_start + settings.bf16_layers_at_end >= arch.num_layers:
        raise UserError(
            f"fp8.bf16_layers_at_start, bf16_layers_at_end: {settings.bf16_layers_at_start} and "
            f"{settings.bf16_layers_at_end} of {arch.num_layers} layers leave none in FP8; lower them, or set "
            "fp8.recipe: none"
        )


def _check_widths(recipe: Recipe, arch: Architecture) -> None:
    """Rows and columns of the weights as a rank has them."""
    wanted, sizes = recipe.fp8.recipe, recipe.parallel
    multiple = _ROWS.get(wanted, 16)
    where = f"fp8.recipe: {wanted}"
    hidden = _BLOCK if _gathers_whole_blocks(recipe) else multiple
    _multiple(where, "the hidden size of the base", arch.hidden_size, hidden)
    queries, keys = arch.shape("QK")
    heads, rows = queries // sizes.tensor, (queries + 2 * keys) // sizes.tensor
    on_rank = "on a rank (parallel.tensor)" if sizes.tensor > 1 else "of the base"
    _multiple(where, f"the rows of queries, keys and values {on_rank}", rows, multiple)
    _multiple(where, f"the heads' width {on_rank}", heads, multiple)
    is_dense = len(arch.moe_layers()) < arch.num_layers or not recipe.model.num_experts
    if is_dense:
        _multiple(where, f"the FFN width {on_rank}", arch.ffn_hidden_size // sizes.tensor, multiple)
    if recipe.model.num_experts:
        on_rank = "on a rank (parallel.expert_tensor)" if sizes.expert_tensor > 1 else "of the base"
        _multiple(where, f"the FFN width {on_rank}", arch.ffn_hidden_size // sizes.expert_tensor, multiple)


def _check_tokens(recipe: Recipe) -> None:
    """Tokens that a rank multiplies at once; those of experts, which vary, are padded."""
    train, data, sizes = recipe.train, recipe.data, recipe.parallel
    if train is None or data is None:
        return
    wanted, parts = recipe.fp8.recipe, sizes.tensor * sizes.context
    multiple = _BLOCK if _gathers_whole_blocks(recipe) else _ROWS.get(wanted, 16)
    tokens = train.micro_batch_size * data.seq_length // parts
    if tokens % multiple:
        raise UserError(
            f"data.seq_length x train.micro_batch_size: {tokens:,} tokens on a rank are no multiple of {multiple}, as "
            f"fp8.recipe: {wanted} needs; {nearest_multiples(tokens, multiple)}"
        )


def _gathers_whole_blocks(recipe: Recipe) -> bool:
    """Whether sequences are gathered in blocks of 128: older versions refuse the rest, newer ones gather it in bf16."""
    if recipe.fp8.recipe != "blockwise" or recipe.parallel.tensor == 1:
        return False
    return _is_before("2.14")


def _is_before(version: str) -> bool:
    """Whether Transformer Engine is older."""
    try:
        return Version(importlib.metadata.version("transformer_engine")) < Version(version)
    except importlib.metadata.PackageNotFoundError:
        return False  # on a machine that plans only


def _multiple(where: str, what: str, size: int, multiple: int) -> None:
    if size % multiple:
        raise UserError(
            f"{where} needs multiples of {multiple}, and {what} is {size}; {nearest_multiples(size, multiple)}"
        )
