#!/usr/bin/env python
"""Conversion of Hugging Face checkpoints from the command line: a thin door to megatron_lpr.conversion."""

import argparse
import sys
from collections.abc import Sequence

from megatron_lpr.conversion.export import MAX_SHARD_BYTES, upcycle_hf
from megatron_lpr.conversion.hf_io import DTYPES
from megatron_lpr.conversion.verify import verify_export
from megatron_lpr.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    upcycle = command("upcycle", "HF model, dense or with experts -> HF MoE model with more, without Megatron")
    upcycle.add_argument("base", metavar="BASE", help="folder of the model")
    upcycle.add_argument("out", metavar="OUT", help="folder to write; must not exist, or be empty")
    upcycle.add_argument("--num-experts", type=int, required=True, help="experts per layer, the frozen ones included")
    upcycle.add_argument("--num-frozen", type=int, default=1, help="frozen experts per layer")
    upcycle.add_argument("--topk", type=int, default=2, help="experts that each token is routed to")
    upcycle.add_argument("--router-std", type=float, default=0.02, help="standard deviation of the initial router")
    upcycle.add_argument("--seed", type=int, default=0, help="seed of the initial router")
    upcycle.add_argument(
        "--mlp-only-layers", type=int, nargs="+", default=[], help="layers (from 0) that get no experts; Qwen only"
    )
    upcycle.add_argument(
        "--shared-expert-size", type=int, default=None, help="width of the zero shared expert; Qwen2 only, None: 128"
    )
    upcycle.add_argument("--dtype", choices=list(DTYPES), default=None, help="dtype to write; None: that of BASE")
    upcycle.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, help="bytes of tensors per shard")

    verify = command("verify", "check an exported HF model against the model it came from")
    verify.add_argument("export", metavar="EXPORT", help="folder of the exported model")
    verify.add_argument("base", metavar="BASE", help="folder of the model it came from")
    verify.add_argument("--num-frozen", type=int, default=1, help="frozen experts per layer")

    commands.add_parser("export", add_help=False, help="trained Megatron checkpoint -> HF model (megatron-lpr export)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 when `verify` found something wrong, or 2 for a UserError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["export"]:
        from megatron_lpr.cli import main as megatron_lpr

        return megatron_lpr(argv)
    args = vars(build_parser().parse_args(argv))
    command = args.pop("command")
    try:
        if command == "upcycle":
            print(f"wrote {upcycle_hf(args.pop('base'), args.pop('out'), **args)}")
            return 0
        report = verify_export(args["export"], args["base"], num_frozen=args["num_frozen"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
