"""The command line: finds the command, parses its arguments, runs it, and tells in one line what went wrong."""

import argparse
import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_lpr import __version__
from megatron_lpr.commands.command import Command, all_commands
from megatron_lpr.commands.exit_status import status_of
from megatron_lpr.errors import AlreadyTold, UserError, nearest
from megatron_lpr.files.json_lines import without_controls
from megatron_lpr.recipe.reading import describe

_RIGHT, _ROOM = "; give the right to read it, or to write there", "; make room and run it again"
_MENDS = {
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: "; choose another place for what is written",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.ENAMETOOLONG: "; choose a shorter name",
    errno.EMFILE: "; allow more open files (ulimit -n)",
}
"""Errors of the system that say enough, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of several commands."""

    name: str
    about: str
    commands: Sequence[Command]
    more: str = ""

    def main(self, words: Sequence[str], *, ends: bool = False) -> int:
        """Run one command; returns the exit status (2: what the user can put right, in one sentence).

        ends: the process ends with it, so that a run which a signal has stopped may end it here.
        """
        if not words or words[0] in ("-h", "--help"):
            print(self._help(), file=sys.stdout if words else sys.stderr)
            return 0 if words else 2
        if words[0] == "--version":
            print(__version__)
            return 0
        commands = {command.name: command for command in self.commands}
        if words[0] not in commands:
            _report(self.name, UserError(f"no command '{words[0]}'{nearest(words[0], commands)}"))
            return 2
        command, name = commands[words[0]], f"{self.name} {words[0]}"
        command_line = shlex.join([self.name, *words])
        return status_of(
            name, lambda: _status(name, command, words[1:], command_line), resumes=command.resumes, ends=ends
        )

    def _help(self) -> str:
        lines = [f"  {command.name:15}{command.about}" for command in self.commands]
        commands = "\n".join(["commands:", *lines, "", f"`{self.name} COMMAND --help` tells the arguments of one."])
        usage = f"usage: {self.name} COMMAND ..."
        return "\n\n".join(part for part in (usage, self.about, commands, self.more) if part)


def main(arguments: Sequence[str] | None = None) -> int:
    """`megatron-lpr`; returns the exit status."""
    program = Program(
        name="megatron-lpr",
        about="Give a dense language model new languages without making it forget its own (MoE-LPR).",
        commands=all_commands(),
        more="A distributed run is the same command under torchrun, or under srun in a Slurm script.",
    )
    return program.main(list(sys.argv[1:] if arguments is None else arguments), ends=arguments is None)


def _status(name: str, command: Command, words: Sequence[str], command_line: str) -> int:
    def report(error: UserError) -> None:
        _report(name, error)

    try:
        _check_surroundings()
        options = _parse(name, command, words)
        options.command_line = command_line
        with _all_ranks(report) if command.distributed else contextlib.nullcontext():
            _run(command, options)
    except AlreadyTold:
        return 2
    except UserError as error:
        report(error)
        return 2
    return 0


def _check_surroundings() -> None:
    """UserError where Python was started so that names of files mean others, or libraries fail later."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the folder that this is started in has been removed: cd to another, or again to it") from None
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        raise UserError(
            f"names of files are {encoding} to Python here, as the locale says, but UTF-8 in recipes: "
            "set PYTHONUTF8=1, or a locale of UTF-8 (LC_ALL=C.UTF-8)"
        )
    if sys.flags.optimize > 1:
        raise UserError("PYTHONOPTIMIZE=2 (python -OO) drops the docstrings that transformers reads: unset it")


def _run(command: Command, options: argparse.Namespace) -> None:
    """What the machine refuses is something for users wherever it is met, of all that a command reads and writes."""
    try:
        command.run(options)
    except OSError as error:
        mend = _MENDS.get(error.errno or 0)
        if mend is None or (isinstance(error, PermissionError) and error.filename is None):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror}{mend}") from error


def _parse(name: str, command: Command, words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=name,
        description=f"{command.about[0].upper()}{command.about[1:]}.",
        epilog="\n".join(["settings of a recipe:", *describe(only=command.reads)]) if command.reads else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        first, *_ = unknown
        if first.startswith("-") and "--" in words[: words.index(first)]:
            raise UserError(f"'{first}' stands behind --, where all words are names: put it before")
        if first.startswith("-"):
            known = (option for action in parser._actions for option in action.option_strings)
            valid = [option for option in known if option.startswith("--")]
            raise UserError(f"no option '{first}'{nearest(first.partition('=')[0], valid)}")
        overrides = getattr(options, "set", ())
        cut = any(word.count(opened) > word.count(shut) for word in overrides for opened, shut in ("{}", "[]"))
        mend = "put a --set that has spaces in quotes" if cut else command.spelling
        raise UserError(f"'{first}' is too much" + (f": {mend}" if mend else ""))
    _refuse_empty(parser, options)
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):  # what Python makes of other bytes
            raise UserError(f"'{word}': is not UTF-8, as text and names of files must be; rename the file")
    return options


def _refuse_empty(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """An empty word is a variable of the shell that nobody set: it would be taken for none, or the current folder."""
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if "" in (value if isinstance(value, list) else [value]):
            spelled = action.option_strings[-1] if action.option_strings else action.metavar
            raise UserError(
                f"{spelled}: is empty; give it a value" + (", or leave it out" * bool(action.option_strings))
            )


@contextlib.contextmanager
def _all_ranks(report: Callable[[UserError], None]) -> Iterator[None]:
    """For a command that runs on several ranks: all of them stop when one does, and one reports why."""
    from megatron_lpr.platform import Ranks, meeting
    from megatron_lpr.platform.lifeline import connected
    from megatron_lpr.platform.meeting import meeting_store

    ranks = Ranks.from_environment()
    with meeting(ranks.rank, ranks.world_size, report), connected(ranks, meeting_store):
        yield


def _report(name: str, error: UserError) -> None:
    print(f"{name}: error: {without_controls(str(error))}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
