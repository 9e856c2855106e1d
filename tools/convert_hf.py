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

# What imports torch is imported where it is used: until then Ctrl-C would find nobody to take it, and help would wait.
from megatron_lpr import cli
from megatron_lpr.errors import AlreadyTold, UserError, warn
from megatron_lpr.platform.stopping import status_of
from megatron_lpr.recipe.reading import from_tree, to_tree
from megatron_lpr.recipe.settings import ExportConfig, ModelConfig, ParallelConfig, Recipe

DTYPES = ("float32", "bfloat16", "float16")
SAYS = "(default: %(default)s)"
LAYOUT = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="convert_hf.py"
    )
    doors = parser.add_subparsers(dest="door", required=True)

    def door(name: str, help: str, *folders: str) -> argparse.ArgumentParser:
        added = doors.add_parser(name, help=help, description=help)
        added.add_argument("--dry-run", action="store_true", help="check, say what would be done, do nothing")
        for folder in folders:
            added.add_argument(folder.lower(), metavar=folder, help=FOLDERS[folder])
        return added

    upcycle = door("upcycle", "HF model -> HF MoE model, without Megatron", "BASE", "OUT")
    upcycle.add_argument(
        "--num-experts", metavar="N", type=int, required=True, help="experts per layer, the frozen ones included"
    )
    _add_expert_options(upcycle)
    upcycle.add_argument(
        "--shared-expert-size", metavar="N", type=int, help="width of Qwen2Moe's zero shared expert (default: 128)"
    )
    upcycle.add_argument("--dtype", choices=DTYPES, help="dtype to write (default: that of BASE)")
    upcycle.add_argument("--max-shard-size", metavar="SIZE", default="4GB", help=f"largest safetensors file {SAYS}")
    upcycle.add_argument("--no-verify", dest="verify", action="store_false", help="do not check the folder first")

    what = "HF model, upcycled or as it is -> distributed checkpoint"
    to_megatron = door("hf-to-megatron", what, "BASE", "CHECKPOINTS")
    to_megatron.add_argument(
        "--num-experts", metavar="N", type=int, default=0, help="experts per layer (default: as many as BASE has)"
    )
    _add_expert_options(to_megatron)
    to_megatron.add_argument(
        "--dtype", choices=DTYPES[:2], help="dtype to write (default: that of BASE; float32 for float16)"
    )
    for size in LAYOUT:
        name = size.replace("_", "-")
        to_megatron.add_argument(f"--{name}", metavar="N", type=int, default=1, help=f"{name}-parallel size {SAYS}")

    to_hf = door("megatron-to-hf", "distributed checkpoint -> HF model", "CHECKPOINT", "OUT")
    to_hf.add_argument("--base", metavar="BASE", help="folder of the base model (default: where training found it)")
    cli.export_options(to_hf)

    verify = door("verify", "check an exported HF model against the model it came from", "EXPORT", "BASE")
    verify.add_argument(
        "--num-frozen", metavar="N", type=int, help="frozen experts (default: what EXPORT's record says, or 1)"
    )

    doors.add_parser("export", add_help=False, help="the same as megatron-lpr export")
    return parser


FOLDERS = {
    "BASE": "folder of the HF model",
    "OUT": "folder to write; must not exist, or be empty",
    "CHECKPOINTS": "folder to write, as the output of a run; must hold no checkpoint",
    "CHECKPOINT": "checkpoint, or output folder of a run",
    "EXPORT": "folder of the exported model",
}


def _add_expert_options(parser: argparse.ArgumentParser) -> None:
    for name, kind, default, what in (
        ("num-frozen", int, 1, "frozen experts per layer"),
        ("router-std", float, 0.02, "standard deviation of the initial router"),
        ("seed", int, 0, "seed of the initial router"),
    ):
        parser.add_argument(f"--{name}", metavar="N", type=kind, default=default, help=f"{what} {SAYS}")
    parser.add_argument(
        "--topk", metavar="N", type=int, help="experts that each token is routed to (default: that of BASE, or 2)"
    )
    parser.add_argument(
        "--mlp-only-layers", metavar="N", type=int, nargs="+", default=(), help="layers (from 0) without experts; Qwen"
    )


def upcycle(options: dict, command_line: str) -> int:
    from megatron_lpr.conversion.export.export import upcycle_hf
    from megatron_lpr.families import read_architecture
    from megatron_lpr.families.expansion import Expansion

    expansion = Expansion(
        num_experts=options["num_experts"],
        num_frozen=options["num_frozen"],
        topk=_topk(options["topk"], read_architecture(options["base"]).topk),
        mlp_only_layers=tuple(options["mlp_only_layers"]),
        router_std=options["router_std"],
        router_seed=options["seed"],
    )
    settings = ExportConfig(
        dtype=options["dtype"] or "auto",
        max_shard_size=options["max_shard_size"],
        shared_expert_size=options["shared_expert_size"],
    )
    upcycle_hf(
        options["base"],
        options["out"],
        expansion,
        settings=settings,
        on_verified=print if options["verify"] else None,
        command=command_line,
        progress=True,
        dry_run=options["dry_run"],
    )
    print(f"{'would write' if options['dry_run'] else 'wrote'} {options['out']}")
    return 0


def hf_to_megatron(options: dict, command_line: str) -> int:
    from megatron_lpr import commands
    from megatron_lpr.families import read_architecture

    arch = read_architecture(options["base"])
    model = ModelConfig(
        base=options["base"],
        num_experts=options["num_experts"] or arch.num_experts,
        num_frozen_experts=options["num_frozen"],
        topk=_topk(options["topk"], arch.topk),
        mlp_only_layers=tuple(options["mlp_only_layers"]),
        router_init_std=options["router_std"],
        router_init_seed=options["seed"],
        dtype=options["dtype"] or _trainable(arch.dtype, options["base"]),
    )
    parallel = ParallelConfig(**{size: options[size] for size in LAYOUT})
    recipe = Recipe(name="convert_hf", output=options["checkpoints"], model=model, parallel=parallel)
    commands.import_hf(from_tree(Recipe, to_tree(recipe), where=command_line), dry_run=options["dry_run"])
    return 0


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


def megatron_to_hf(options: dict, command_line: str) -> int:
    from megatron_lpr import commands
    from megatron_lpr.checkpoint.run_state import checkpoint_folder, read_run_state

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
    from megatron_lpr.conversion.verify.verify import verify_export
    from megatron_lpr.families import read_architecture
    from megatron_lpr.families.hf_config import read_config

    if options["dry_run"]:
        read_config(options["export"]), read_architecture(options["base"])
        print(f"would verify {options['export']} against {options['base']}")
        return 0
    report = verify_export(options["export"], options["base"], num_frozen=options["num_frozen"], progress=True)
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
    return status_of("convert_hf.py", lambda: _status(door, options, shlex.join(["convert_hf.py", *argv])))


def _status(door: str, options: dict, command_line: str) -> int:
    try:
        with cli.all_ranks(report) if door == "hf-to-megatron" else contextlib.nullcontext():
            return DOORS[door](options, command_line)
    except AlreadyTold:
        return 2
    except UserError as error:
        report(error)
        return 2


def report(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
