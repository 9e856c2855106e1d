"""What a command prints, where it cannot be written: a Slurm log on a full disk ends no run of days.

It imports nothing heavy, as exit_status.py.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

STREAMS = ("stdout", "stderr")


class LossyStream:
    """A text stream of which lines that cannot be written are lost; `error` is the last of their errors.

    Not so a pipe that nobody reads any more: that is how a reader says that he has seen enough. Characters that its
    encoding lacks, as ő where the locale has no UTF-8, are written as \\u0151.
    """

    def __init__(self, stream: TextIO):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._remembered():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._remembered():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.error = error


@contextlib.contextmanager
def lossy_streams() -> Iterator[list[LossyStream]]:
    """stdout and stderr as `LossyStream`s; one that is closed is /dev/null, or the next file would take its number."""
    before = {name: getattr(sys, name) for name in STREAMS}
    streams = [LossyStream(before[name] or open(os.devnull, "w")) for name in STREAMS]
    for name, stream in zip(STREAMS, streams, strict=True):
        setattr(sys, name, stream)
    try:
        yield streams
    finally:
        for name, stream in zip(STREAMS, streams, strict=True):
            if getattr(sys, name) is stream and before[name] is not None:
                setattr(sys, name, before[name])
            if stream.error:
                drop(stream)


def drop(stream: TextIO | LossyStream) -> None:
    """What is still to be written to a stream; Python would try again when it ends, and complain."""
    with contextlib.suppress(io.UnsupportedOperation):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
