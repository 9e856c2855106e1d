"""`megatron-lpr route`: where a checkpoint sends each token of a text, as a coloured page."""

import argparse
from pathlib import Path

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import add_own_recipe, found_checkpoint, recipe_of
from megatron_lpr.errors import UserError

SPELLING = "the checkpoint comes first and brings its recipe, as route CHECKPOINT --text FILE --out FILE"
READS = (
    "model.base",
    "model.load",
    "model.spec",
    "evaluation.window",
    "evaluation.batch",
    "preprocess.bos",
    "preprocess.parse_special_tokens",
    "checkpoint.verify",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, or output folder of a run")
    what = "text file of any kind that preprocess.corpora[].files knows; may be given several times"
    parser.add_argument("--text", metavar="FILE", action="append", default=[], help=what)
    what = "words in place of a file; may be given several times"
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help=what)
    parser.add_argument("--out", metavar="FILE", required=True, help="HTML page to write, which ends in .html")
    what = "colour by this layer alone, counted from 0 (default: the mean over all layers)"
    parser.add_argument("--layer", metavar="N", type=int, help=what)
    add_own_recipe(parser)


def run(options: argparse.Namespace) -> None:
    """Write the page of some texts, and a table of them to the terminal."""
    from megatron_lpr.evaluation.retention import markdown
    from megatron_lpr.evaluation.token_routing import plan_routing, read_texts
    from megatron_lpr.files.output_place import check_page
    from megatron_lpr.platform import single_process
    from megatron_lpr.reporting.routing_page import RoutingPage

    single_process("route")
    checkpoint = found_checkpoint(options.checkpoint, SPELLING)
    routing = plan_routing(checkpoint, recipe_of(checkpoint, options, READS))
    layers = routing.layers
    if options.layer is not None and options.layer not in layers:
        raise UserError(f"--layer {options.layer}: has no experts; layers {_ranges(layers)} of {checkpoint} have")
    check_page(options.out, "routing.html")
    texts = read_texts(options.text, options.prompt)
    if options.dry_run:
        routing.check()
        print(f"would write the routing of {', '.join(texts)} by {checkpoint} to {options.out}")
        return
    routed = routing.run(texts)
    page = RoutingPage(
        title="Routing, token by token",
        about=f"{routing.recipe.name}: {checkpoint}, windows of {routing.recipe.evaluation.window} tokens",
        num_frozen=routing.recipe.model.num_frozen_experts,
        layers=layers,
        layer=None if options.layer is None else layers.index(options.layer),
    )
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        file.writelines(page.html(routed))
    print(f"{markdown(page.rows(routed), left_columns=1)}\n-> {out}")


def _ranges(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


COMMAND = Command(
    "route",
    "where a checkpoint sends each token of a text, as a coloured HTML page",
    add_arguments,
    run,
    reads=READS,
    place=10,
    spelling=SPELLING,
)
