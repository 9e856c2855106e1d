"""`megatron-lpr preprocess`: text becomes corpora; without a recipe one corpus, described on the command line."""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import add_recipe, typed_recipe
from megatron_lpr.errors import UserError
from megatron_lpr.files.yaml_io import parse_yaml
from megatron_lpr.recipe.reading import REST
from megatron_lpr.recipe.text_settings import PreprocessConfig, SourceConfig

if TYPE_CHECKING:
    from megatron_lpr.data.corpus.manifest import Manifest
    from megatron_lpr.data.text.tokenize import Tokenizer

_SOURCE = ("name", "files", "prefix", "language", "role", "text_field", "languages", "language_field", "tagger")
_SETTINGS = ("output", "tokenizer", "on_bad_line", "heldout", "seed", "workers", "engine", "bos")
_TOLD = ("output", "tokenizer", "corpora")  # settings that a dry run tells by themselves
_FLAG = {"files": "--input"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, optional=True)
    parser.add_argument("--overwrite", action="store_true", help="replace corpora that were made from other text")
    _add_one_corpus(parser)


def run(options: argparse.Namespace) -> None:
    """Tokenise the recipe's corpora into Megatron .bin/.idx files and a manifest."""
    from megatron_lpr.data.preprocess.preprocess import check, preprocess
    from megatron_lpr.recipe.checks import check_preprocessing

    recipe = typed_recipe(options, _under(options))
    settings = recipe.preprocess
    check_preprocessing(recipe)
    complete = dataclasses.replace(settings, tokenizer=settings.tokenizer or recipe.model.base)
    if options.dry_run:
        print("\n".join(_told(complete, *check(complete))))
        return
    manifest = preprocess(complete, overwrite=options.overwrite)
    for corpus in manifest.corpora:
        size = f"{corpus.documents:,} documents, {corpus.tokens:,} tokens"
        size += f", languages {', '.join(corpus.languages)}" if corpus.languages else ""
        if out := corpus.heldout:
            size += f"; held out {out.documents:,} documents, {out.bytes:,} bytes: {corpus.held_out_file}"
        print(f"{corpus.name}: {corpus.language} ({corpus.role}), {size}")
    bos = manifest.tokenizer.bos_id
    print(f"manifest: {manifest.path}" + ("" if bos is None else f"; documents open with the BOS token {bos}"))


def _told(
    settings: PreprocessConfig, sources: Sequence[SourceConfig], tokenizer: "Tokenizer", manifest: "Manifest"
) -> Iterator[str]:
    """What would be done."""
    from megatron_lpr.training.plan_lines import decimal_size, differing, one_line

    opens = "" if tokenizer.bos_id is None else f", the BOS token {tokenizer.bos_id} opens documents"
    yield f"tokenizer {settings.tokenizer}: {tokenizer.vocab_size:,} tokens{opens}"
    if others := {name: value for name, value in differing(settings).items() if name not in _TOLD}:
        yield f"settings other than the defaults: {one_line(others)}"
    there = {corpus.name for corpus in manifest.corpora}
    for source in sources:
        size = decimal_size(sum(os.path.getsize(file) for file in source.files))
        text = f"{len(source.files):,} file(s), {size}" if source.prefix is None else f"as it is in {source.prefix}.bin"
        known = ", in the manifest already" if source.name in there else ""
        yield f"{source.name}: {source.language} ({source.role}), {text}{known}"
    yield f"would write {manifest.path}"


def _add_one_corpus(parser: argparse.ArgumentParser) -> None:
    """The options that stand for a recipe."""
    group = parser.add_argument_group(
        "one corpus, without a recipe", "as --input text/hu.jsonl.gz --name hu --language hu --role expanded "
        "--tokenizer models/smollm2 --output data; a recipe says more, and says it for many corpora",
    )  # fmt: skip
    for config, names in ((SourceConfig, _SOURCE), (PreprocessConfig, _SETTINGS)):
        for name in names:
            documentation = config.__dataclass_fields__[name].metadata["doc"].replace("%", "%%")
            nargs = "+" if name == "files" else None
            flag = _FLAG.get(name, f"--{name.replace('_', '-')}")
            group.add_argument(flag, dest=f"one_{name}", help=documentation, metavar=name.upper(), nargs=nargs)


def _under(options: argparse.Namespace) -> dict[str, Any]:
    """What lies under the recipe: values for what it may leave out, or all of it where the options are used.

    Raises:
        UserError: neither a recipe nor options, or both.
    """
    given = {name: getattr(options, f"one_{name}") for name in (*_SOURCE, *_SETTINGS)}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        if options.recipe is None:
            raise UserError("give a recipe, or --input with --name, --language, --role, --tokenizer and --output")
        return REST
    if options.recipe is not None:
        flags = ", ".join(_FLAG.get(name, f"--{name.replace('_', '-')}") for name in given)
        raise UserError(f"{flags}: these stand for a recipe; with {options.recipe} use --set preprocess.KEY=VALUE")
    source = {name: value for name, value in given.items() if name in _SOURCE}
    if "languages" in source:
        source["languages"] = parse_yaml(source["languages"], "--languages")
    settings = {name: value for name, value in given.items() if name in _SETTINGS}
    return REST | {"preprocess": settings | {"corpora": [source]}}


COMMAND = Command(
    "preprocess",
    "tokenise text into Megatron .bin/.idx corpora and a manifest",
    add_arguments,
    run,
    reads=("preprocess", "model.base"),
    place=1,
)
