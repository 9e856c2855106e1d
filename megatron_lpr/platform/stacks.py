"""What a process is doing, written down by a thread that must not hang itself."""

import faulthandler
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path


def write_stacks(folder: Path, rank: int) -> None:
    """The stacks of all threads of this process, the newest call first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank_{rank:05d}.txt").open("w", encoding="utf-8") as file:
        file.write(f"rank {rank}, process {os.getpid()} on {socket.gethostname()}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def within(seconds: float, function: Callable[[], object]) -> bool:
    """Whether function() has ended in time; it may hang in a file system, or fail, which is left to its own thread."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
