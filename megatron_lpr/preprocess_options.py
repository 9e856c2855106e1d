"""`megatron-lpr preprocess` without a recipe: one corpus, described on the command line."""

import argparse
from typing import Any

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import PreprocessConfig, SourceConfig

# What a recipe that is about preprocessing alone may leave out.
REST = {"name": "preprocess", "output": ".", "model": {"base": ""}}
_SOURCE = ("name", "files", "prefix", "language", "role", "text_field", "language_field", "tagger")
_SETTINGS = ("output", "tokenizer", "on_bad_line", "seed", "workers", "engine", "bos")
_FLAG = {"files": "--input"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that stand for a recipe."""
    group = parser.add_argument_group(
        "one corpus, without a recipe", "as --input text/hu.jsonl.gz --name hu --language hu --role expanded "
        "--tokenizer models/smollm2 --output data; a recipe says more, and says it for many corpora",
    )  # fmt: skip
    for config, names in ((SourceConfig, _SOURCE), (PreprocessConfig, _SETTINGS)):
        for name in names:
            documentation = config.__dataclass_fields__[name].metadata["doc"].replace("%", "%%")
            several = {"nargs": "+"} if name == "files" else {}
            flag = _FLAG.get(name, f"--{name.replace('_', '-')}")
            group.add_argument(flag, dest=f"one_{name}", help=documentation, metavar=name.upper(), **several)


def take_tree(options: dict[str, Any]) -> dict[str, Any]:
    """What lies under the recipe: values for what it may leave out, or all of it where the options are used.

    Removes from `options` what `add_options` put there.

    Raises:
        UserError: neither a recipe nor options, or both.
    """
    given = {name: options.pop(f"one_{name}") for name in (*_SOURCE, *_SETTINGS)}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        if options.get("recipe") is None:
            raise UserError("give a recipe, or --input with --name, --language, --role, --tokenizer and --output")
        return REST
    if options.get("recipe") is not None:
        flags = ", ".join(_FLAG.get(name, f"--{name.replace('_', '-')}") for name in given)
        raise UserError(f"{flags}: these stand for a recipe; with {options['recipe']} use --set preprocess.KEY=VALUE")
    source = {name: value for name, value in given.items() if name in _SOURCE}
    settings = {name: value for name, value in given.items() if name in _SETTINGS}
    return REST | {"preprocess": settings | {"corpora": [source]}}
