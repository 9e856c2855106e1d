#!/usr/bin/env python
"""Conversion between Hugging Face and Megatron without a recipe: thin doors to megatron_lpr.conversion.

hf-to-megatron is the only one that runs Megatron; start it with torchrun for a model that one process cannot hold. The
checkpoint that it writes loads at every layout, whatever the sizes it was written with.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

# What imports torch is imported where it is used: until then Ctrl-C would find nobody to take it, and help would wait.
from megatron_lpr.cli import Program
from megatron_lpr.commands import export
from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import add_dry_run
from megatron_lpr.errors import UserError, warn
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.sections import check_setting
from megatron_lpr.recipe.settings import ExportConfig, ModelConfig, Recipe

DTYPES = ("float32", "bfloat16", "float16")
SAYS = "(default: %(default)s)"
LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
# options of new experts, and the values without them
EXPERTS: dict[str, Any] = {"num_frozen": 1, "router_std": 0.02, "seed": 0}


def add_hf_to_hf(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser, BASE="folder of the HF model", OUT="folder to write; must not exist, or be empty")
    _add_experts(parser, "experts per layer, the frozen ones included", required=True)
    parser.add_argument(
        "--shared-expert-size", metavar="N", type=int, help="width of Qwen2Moe's zero shared expert (default: 128)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to write (default: that of BASE)")
    parser.add_argument("--max-shard-size", metavar="SIZE", default="4GB", help=f"largest safetensors file {SAYS}")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not check the folder first")


def add_hf_to_megatron(parser: argparse.ArgumentParser) -> None:
    out = "folder to write, as the output of a run; must hold no checkpoint"
    _add_folders(parser, BASE="folder of the HF model", CHECKPOINTS=out)
    _add_experts(parser, "experts per layer (default: as many as BASE has)", required=False)
    parser.add_argument(
        "--dtype", choices=DTYPES[:2], help="dtype to write (default: that of BASE; float32 for float16)"
    )
    for size in LAYOUT:
        name = size.replace("_", "-")
        parser.add_argument(f"--{name}", metavar="N", type=int, default=1, help=f"{name}-parallel size {SAYS}")


def add_for_llama_cpp(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser, EXPORT="Qwen2-MoE export", OUT="folder to write; must not exist, or be empty")


def _add_folders(parser: argparse.ArgumentParser, **folders: str) -> None:
    for folder, what in folders.items():
        parser.add_argument(folder.lower(), metavar=folder, help=what)
    add_dry_run(parser)


def _add_experts(parser: argparse.ArgumentParser, what: str, *, required: bool) -> None:
    parser.add_argument("--num-experts", metavar="N", type=int, required=required, default=0, help=what)
    for option, kind, help_text in (
        ("num_frozen", int, "frozen experts per layer"),
        ("router_std", float, "standard deviation of the initial router"),
        ("seed", int, "seed of the initial router"),
    ):
        name = option.replace("_", "-")
        parser.add_argument(f"--{name}", metavar="N", type=kind, help=f"{help_text} (default: {EXPERTS[option]})")
    parser.add_argument(
        "--topk", metavar="N", type=int, help="experts that each token is routed to (default: that of BASE, or 2)"
    )
    parser.add_argument(
        "--mlp-only-layers", metavar="N", type=int, nargs="+", default=(), help="layers (from 0) without experts; Qwen"
    )


def hf_to_hf(options: argparse.Namespace) -> None:
    from megatron_lpr.conversion.export.export import upcycle_hf
    from megatron_lpr.families import read_architecture
    from megatron_lpr.families.expansion import Expansion

    arch = read_architecture(options.base)
    _refuse_what_has_no_effect(options, options.num_experts or arch.num_experts, arch.num_experts)
    experts = _experts(options)
    check_setting(ModelConfig, "router_init_std", experts["router_std"], "--router-std")
    check_setting(ModelConfig, "router_init_seed", experts["seed"], "--seed")
    expansion = Expansion(
        num_experts=options.num_experts,
        num_frozen=experts["num_frozen"],
        topk=_topk(options.topk, arch.topk),
        mlp_only_layers=tuple(options.mlp_only_layers),
        router_std=experts["router_std"],
        router_seed=experts["seed"],
    )
    settings = ExportConfig(
        dtype=options.dtype or "auto",
        max_shard_size=options.max_shard_size,
        shared_expert_size=options.shared_expert_size,
    )
    upcycle_hf(
        options.base,
        options.out,
        expansion,
        settings=settings,
        on_verified=print if options.verify else None,
        command=options.command_line,
        progress=True,
        dry_run=options.dry_run,
    )
    print(f"{'would write' if options.dry_run else 'wrote'} {options.out}")


def for_llama_cpp(options: argparse.Namespace) -> None:
    from megatron_lpr.conversion.export.for_llama_cpp import write_for_llama_cpp

    out = write_for_llama_cpp(options.export, options.out, dry_run=options.dry_run)
    print(f"{'would write' if options.dry_run else 'wrote'} {out}: give it to convert_hf_to_gguf.py")


def hf_to_megatron(options: argparse.Namespace) -> None:
    from megatron_lpr.conversion.import_hf import import_hf
    from megatron_lpr.families import read_architecture

    arch = read_architecture(options.base)
    num_experts = options.num_experts or arch.num_experts
    _refuse_what_has_no_effect(options, num_experts, arch.num_experts)
    experts = _experts(options)
    model = {
        "base": options.base,
        "num_experts": num_experts,
        "num_frozen_experts": experts["num_frozen"],
        "topk": _topk(options.topk, arch.topk),
        "mlp_only_layers": list(options.mlp_only_layers),
        "router_init_std": experts["router_std"],
        "router_init_seed": experts["seed"],
        "dtype": options.dtype or _trainable(arch.dtype, options.base),
    }
    parallel = {size: getattr(options, size) for size in LAYOUT}
    tree = {"name": "convert_hf", "output": options.checkpoints, "model": model, "parallel": parallel}
    import_hf(from_tree(Recipe, tree, where=options.command_line), dry_run=options.dry_run, progress=True)


def _refuse_what_has_no_effect(options: argparse.Namespace, num_experts: int, of_base: int) -> None:
    """A dense model has no experts; one that keeps its experts keeps its routers."""
    why = {name: "a dense import has no experts; give --num-experts" for name in (*EXPERTS, "topk")}
    if num_experts:
        why = {} if num_experts != of_base else dict.fromkeys(("router_std", "seed"), "no expert is new")
    for name, reason in why.items():
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: has no effect, for {reason}")


def _experts(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in EXPERTS}
    return EXPERTS | {name: value for name, value in given.items() if value is not None}


def _topk(asked: int | None, of_base: int) -> int:
    return asked if asked is not None else of_base or 2


def _trainable(dtype: str, base: str) -> str:
    """The dtype of the base's checkpoint: its own, but for float16, in which nothing is trained here."""
    from megatron_lpr.platform import Ranks

    if dtype != "float16":
        return dtype
    if Ranks.from_environment().rank == 0:
        warn(
            f"'{base}' is float16, in which nothing is trained here: the checkpoint is float32, exactly the same "
            "numbers; export it with --dtype float16 to have their bytes again"
        )
    return "float32"


DOORS = (
    Command(
        name="hf-to-megatron",
        about="HF model, upcycled or as it is -> distributed checkpoint",
        add_arguments=add_hf_to_megatron,
        run=hf_to_megatron,
        distributed=True,
    ),
    dataclasses.replace(export.COMMAND, name="megatron-to-hf", about="distributed checkpoint -> HF model"),
    Command(
        name="hf-to-hf",
        about="HF model -> HF model with experts, without Megatron",
        add_arguments=add_hf_to_hf,
        run=hf_to_hf,
    ),
    Command(
        name="for-llama-cpp",
        about="Qwen2-MoE export -> folder that llama.cpp's converter reads",
        add_arguments=add_for_llama_cpp,
        run=for_llama_cpp,
    ),
)


def main(words: Sequence[str] | None = None) -> int:
    """Goes through one door; returns the exit status."""
    program = Program(name="convert_hf.py", about=(__doc__ or "").strip(), commands=DOORS)
    return program.main(list(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
