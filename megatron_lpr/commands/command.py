"""What a command is, and which there are."""

import argparse
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from megatron_lpr import commands


@dataclass(frozen=True)
class Command:
    """A word of the command line, and what follows it.

    about: what it does; the line in the list of commands.
    add_arguments: gives a parser its arguments; `run` gets what it has parsed, and the words in `command_line`.
    reads: settings of a recipe, as describe(only=...) takes them: `--help` shows these.
    place: in the list of commands, which is the order of the work.
    spelling: how its arguments go, for whoever has typed a word too many.
    distributed: runs on several ranks, all of which stop when one does.
    resumes: started again it goes on where it was, so that to be stopped is no failure.
    """

    name: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    _: KW_ONLY
    reads: tuple[str, ...] = ()
    place: int = 0
    spelling: str = ""
    distributed: bool = False
    resumes: bool = False


def all_commands() -> list[Command]:
    """Of every module beside this one that has a COMMAND, in the order of the work."""
    modules = [
        importlib.import_module(f"{commands.__name__}.{m.name}") for m in pkgutil.iter_modules(commands.__path__)
    ]
    found = [module.COMMAND for module in modules if hasattr(module, "COMMAND")]
    return sorted(found, key=lambda command: command.place)
