#!/usr/bin/env python
"""Conversion between Hugging Face and Megatron from the command line: a thin door to megatron_lpr.conversion.

hf-to-megatron is the only one that runs Megatron; start it with torchrun for a model that one process cannot hold. The
checkpoint that it writes loads at every layout, whatever the sizes it was written with.
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence

from megatron_lpr import cli, commands
from megatron_lpr.config import ModelConfig, ParallelConfig, Recipe
from megatron_lpr.conversion.export import upcycle_hf
from megatron_lpr.conversion.families import read_architecture
from megatron_lpr.conversion.hf_io import DTYPES
from megatron_lpr.conversion.sizes import parse_size
from megatron_lpr.conversion.verify import verify_export
from megatron_lpr.errors import AlreadyTold, UserError
from megatron_lpr.recipe_io import from_tree, to_tree
from megatron_lpr.training.run_state import checkpoint_folder, read_run_state

LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="convert_hf.py"
    )
    doors = parser.add_subparsers(dest="door", required=True)

    def door(name: str, help: str, *folders: str) -> argparse.ArgumentParser:
        added = doors.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        for folder in folders:
            added.add_argument(folder.lower(), metavar=folder, help=FOLDERS[folder])
        return added

    upcycle = door("upcycle", "HF model -> HF MoE model, without Megatron", "BASE", "OUT")
    upcycle.add_argument("--num-experts", type=int, required=True, help="experts per layer, the frozen ones included")
    _add_expert_options(upcycle)
    upcycle.add_argument("--shared-expert-size", type=int, default=None, help="width of Qwen2Moe's zero shared expert")
    upcycle.add_argument("--dtype", choices=list(DTYPES), default=None, help="dtype to write; None: that of BASE")
    upcycle.add_argument("--max-shard-size", metavar="SIZE", default="4GB", help="largest safetensors file")
    upcycle.add_argument("--processes", metavar="N", type=int, default=1, help="processes that share the work")
    upcycle.add_argument("--no-verify", dest="verify", action="store_false", help="do not check the folder first")

    to_megatron = door("hf-to-megatron", "HF model, upcycled or as it is -> distributed checkpoint", "BASE", "OUT")
    to_megatron.add_argument("--num-experts", type=int, default=0, help="experts per layer; 0: as many as BASE has")
    _add_expert_options(to_megatron)
    to_megatron.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="None: that of BASE")
    for size in LAYOUT:
        to_megatron.add_argument(f"--{size.replace('_', '-')}", type=int, default=1, help=f"{size}-parallel size")

    to_hf = door("megatron-to-hf", "distributed checkpoint -> HF model", "CHECKPOINT", "OUT")
    to_hf.add_argument("--base", default=None, help="folder of the base model; None: where training found it")
    cli.export_options(to_hf)

    verify = door("verify", "check an exported HF model against the model it came from", "EXPORT", "BASE")
    verify.add_argument(
        "--num-frozen", type=int, default=None, help="frozen experts per layer; None: what EXPORT's record says, or 1"
    )

    doors.add_parser("export", add_help=False, help="the same as megatron-lpr export")
    return parser


FOLDERS = {
    "BASE": "folder of the HF model",
    "OUT": "folder to write; must not exist, or be empty",
    "CHECKPOINT": "checkpoint, or output folder of a run",
    "EXPORT": "folder of the exported model",
}


def _add_expert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mlp-only-layers", type=int, nargs="+", default=(), help="layers (from 0) that get no experts; Qwen only"
    )
    parser.add_argument("--num-frozen", type=int, default=1, help="frozen experts per layer")
    parser.add_argument("--topk", type=int, default=2, help="experts that each token is routed to")
    parser.add_argument("--router-std", type=float, default=0.02, help="standard deviation of the initial router")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial router")


def upcycle(options: dict, command_line: str) -> int:
    base, out, verify = options.pop("base"), options.pop("out"), options.pop("verify")
    max_shard_bytes = parse_size(options.pop("max_shard_size"))
    upcycle_hf(
        base,
        out,
        **options,
        max_shard_bytes=max_shard_bytes,
        on_verified=print if verify else None,
        command=command_line,
        progress=True,
    )
    print(f"wrote {out}")
    return 0


def hf_to_megatron(options: dict, command_line: str) -> int:
    arch = read_architecture(options["base"])
    as_it_is = arch.num_experts and options["num_experts"] in (0, arch.num_experts)
    model = ModelConfig(
        base=options["base"],
        num_experts=options["num_experts"] or arch.num_experts,
        num_frozen_experts=options["num_frozen"],
        topk=arch.topk if as_it_is else options["topk"],
        mlp_only_layers=tuple(options["mlp_only_layers"]),
        router_init_std=options["router_std"],
        router_init_seed=options["seed"],
        dtype=options["dtype"] or arch.dtype,
    )
    parallel = ParallelConfig(**{size: options[size] for size in LAYOUT})
    recipe = Recipe(name="convert_hf", output=options["out"], model=model, parallel=parallel)
    commands.import_hf(from_tree(Recipe, to_tree(recipe), where=command_line))
    return 0


def megatron_to_hf(options: dict, command_line: str) -> int:
    checkpoint, base, settings = options.pop("checkpoint"), options.pop("base"), cli.export_settings(options)
    folder = checkpoint_folder(checkpoint)
    tree = read_run_state(folder).recipe
    if base:
        tree["model"]["base"] = base
    tree["export"] |= settings
    recipe = from_tree(Recipe, tree, where=str(folder))
    commands.export(recipe, checkpoint=checkpoint, **options, command_line=command_line)
    return 0


def verify(options: dict, command_line: str) -> int:
    report = verify_export(options["export"], options["base"], num_frozen=options["num_frozen"])
    print(report)
    if not report.ok:
        raise UserError(f"verify {options['export']}: failed (see above)")
    return 0


DOORS = {"upcycle": upcycle, "hf-to-megatron": hf_to_megatron, "megatron-to-hf": megatron_to_hf, "verify": verify}


def main(argv: Sequence[str] | None = None) -> int:
    """Goes through one door; returns 0, or 2 for a UserError, as when `verify` found something wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["export"]:
        return cli.main(argv)
    options = vars(build_parser().parse_args(argv))
    door = options.pop("door")
    try:
        with cli.all_ranks(report) if door == "hf-to-megatron" else contextlib.nullcontext():
            return DOORS[door](options, shlex.join(["convert_hf.py", *argv]))
    except AlreadyTold:
        return 2
    except UserError as error:
        report(error)
        return 2


def report(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
