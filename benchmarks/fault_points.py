"""Where faults.py lets something go wrong: what a run does to its checkpoints, its disk, its files; how far it came."""

import atexit
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_lpr.checkpoint.completion import cut_off

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _on_save_events(output: Path, name: str, act: Callable[[int], None]) -> None:
    """act(n) just before the process, or one that it forks, does the n-th thing to files below `output`/checkpoints."""
    root, count = str(output / "checkpoints"), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in _CHANGES and not (event == "open" and arguments[2] and arguments[2] & _TO_WRITE):
            return
        if any(root in os.fspath(a) and name in os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)):
            count += 1
            act(count)

    sys.addaudithook(hook)


def at_save_event(output: Path, number: int, signum: int, name: str = "") -> None:
    """Send this process a signal just before its `number`-th change of a file there that has `name` in its path."""
    process = os.getpid()

    def act(count: int) -> None:
        if count == number:
            os.kill(process, signum)

    _on_save_events(output, name, act)


def count_save_events(output: Path, file: Path) -> None:
    """Write the number of these events to a file at the end."""
    counts = []
    _on_save_events(output, "", counts.append)
    atexit.register(lambda: file.write_text(str(len(counts))))


def file_size_limit(limit: int) -> None:
    """No file can be written beyond so many bytes, as with a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """`folder` lies on a disk of so many bytes, until what is yielded is called. Needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True) and None
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class Damage:
    """Damages files."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def do(self, what: str, file: Path) -> None:
        """flip (one bit), cut, empty or remove."""
        content = bytearray(file.read_bytes())
        if what == "flip" and content:
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        elif what == "cut":
            del content[self.chance.randrange(max(1, len(content))) :]
        elif what == "empty":
            content.clear()
        file.write_bytes(content)
        if what == "remove":
            file.unlink()


def intervals_at_risk(output: Path, statuses: Sequence[int] | None) -> int:
    """How many save intervals a fault may cost.

    One, where a killed run had written all of its saves; two, where it had not, could not, or its newest checkpoint is
    damaged; three, where both may be.

    Args:
        statuses: with which the run ended, on each rank; None: it had ended before.
    """
    root = output / "checkpoints"
    if statuses and -signal.SIGKILL in statuses and (cut_off(root) or not any(root.glob(".writing_*"))):
        return 1
    return 2 if statuses else 3


def steps_made(output: Path) -> int:
    """The last step of a run whose metrics were written whole."""
    file = output / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def steps_of_starts(output: Path) -> list[int]:
    """The step at which each start of a run began that came so far."""
    file = output / "starts.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []
