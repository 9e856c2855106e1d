"""Errors for users: what is wrong, where, and how to fix it, in one sentence.

A `UserError` ends a command with its message and exit status 2, without a traceback. Mistakes of the
programmer are `assert`s and keep theirs.
"""

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right: a path, a configuration value, a corpus, a checkpoint."""


class AlreadyTold(UserError):
    """A `UserError` that stops this rank and has been printed, here or by another rank of the run."""


STOPPED = 75  # EX_TEMPFAIL of sysexits.h


class Stopped(SystemExit):
    """A run that was asked to stop has saved and said so; a script that lets it through ends with exit status 75."""

    def __init__(self, status: int = STOPPED) -> None:
        super().__init__(status)  # an argument, so that it can be pickled on its way out of a process


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint to append to a message about an unknown `name`: the closest valid name, or all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; valid: {', '.join(valid)}"


def warn(sentence: str) -> None:
    """Tells the user something that stops nothing, on stderr."""
    print(f"warning: {sentence}", file=sys.stderr, flush=True)
