"""How many processor cores this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_PROCESS_GROUPS, _MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_V1, _V2 = ("cpu.cfs_quota_us", "cpu.cfs_period_us"), ("cpu.max",)  # files with a quota and its period


def usable_cores() -> int:
    """Cores of the process' affinity, as Slurm sets it, and no more than a container's CPU quota, rounded up.

    Twice as many threads as a quota has cores do not compute half as fast: all of them stand still for the rest of each
    period once the quota is spent.
    """
    return min([len(os.sched_getaffinity(0)), *(max(1, math.ceil(quota)) for quota in _quotas())])


def _quotas() -> Iterator[float]:
    """In cores, of the control groups that this process is in: its own and those around it (cgroups(7), v2 and v1)."""
    try:
        groups = [line.split(":", 2)[1:] for line in _PROCESS_GROUPS.read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, files = (_MOUNTED / "cpu", _V1) if controllers else (_MOUNTED, _V2)
        # a container sees its own group at the top, under a path that may be there on the host alone
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            quota = _words(top / group, *files)
            if len(quota) == 2 and quota[0] not in ("max", "-1"):
                yield int(quota[0]) / int(quota[1])


def _words(folder: Path, *files: str) -> list[str]:
    try:
        return [word for file in files for word in (folder / file).read_text().split()]
    except OSError:
        return []
