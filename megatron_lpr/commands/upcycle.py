"""`megatron-lpr upcycle`: the base model with experts, as a checkpoint or as a stock Hugging Face model."""

import argparse
import functools

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import add_recipe, single_process, typed_recipe
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--hf", metavar="OUT", help="new folder: write a stock Hugging Face model, without Megatron")


def run(options: argparse.Namespace) -> None:
    """Write the upcycled model as a checkpoint (step 0), or as what an export of that checkpoint would be."""
    from megatron_lpr.conversion.load.import_hf import import_hf
    from megatron_lpr.platform.meeting import together

    recipe = together(functools.partial(typed_recipe, options))
    if not recipe.model.num_experts:
        raise UserError("model.num_experts: 0; upcycling needs at least 2 experts")
    if options.hf is None:
        import_hf(recipe, dry_run=options.dry_run)
    else:
        together(functools.partial(single_process, "upcycle --hf"))
        _upcycle_hf(recipe, options.hf, options)


def _upcycle_hf(recipe: Recipe, out: str, options: argparse.Namespace) -> None:
    from megatron_lpr.conversion.export.export import upcycle_hf
    from megatron_lpr.families.sizes import parse_size

    model, settings = recipe.model, recipe.export
    upcycle_hf(
        model.base,
        out,
        num_experts=model.num_experts,
        num_frozen=model.num_frozen_experts,
        topk=model.topk,
        router_std=model.router_init_std,
        seed=model.router_init_seed,
        dtype=model.dtype if settings.dtype == "auto" else settings.dtype,
        mlp_only_layers=model.mlp_only_layers,
        shared_expert_size=settings.shared_expert_size,
        max_shard_bytes=parse_size(settings.max_shard_size),
        processes=settings.processes,
        on_verified=print,
        command=options.command_line,
        progress=True,
        dry_run=options.dry_run,
    )
    print(f"{'would write' if options.dry_run else 'wrote'} {out}")


COMMAND = Command(
    name="upcycle",
    about="write the base model with experts, as a checkpoint in the recipe's output or as a Hugging Face model",
    add_arguments=add_arguments,
    run=run,
    reads=("output", "model", "parallel", "export"),
    place=4,
    distributed=True,
)
