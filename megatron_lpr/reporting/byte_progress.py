"""The progress bar of a conversion: share done, bytes, bytes per second, time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def byte_progress(name: str, total: int, *, show: bool) -> Iterator["tqdm"]:
    """A bar on stderr whose `update` takes bytes; in a log file it is renewed every ten seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, desc=name, unit="B", unit_scale=True, disable=not show, mininterval=interval, dynamic_ncols=True
    ) as bar:
        yield bar
