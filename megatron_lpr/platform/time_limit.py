"""When Slurm will end the job that this process belongs to."""

import contextlib
import datetime
import os
import subprocess

from megatron_lpr.errors import warn

_SECONDS = 10


def job_end() -> float | None:
    """Seconds since 1970 at which the job's time is over; None outside of a job, without a limit, or if nobody tells.

    Newer versions of Slurm say it in the environment; of others `squeue` is asked once.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    with contextlib.suppress(KeyError, ValueError):
        return float(os.environ["SLURM_JOB_END_TIME"])
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        warn(f"the time limit of Slurm job {job} is not known ({error}): the run does not stop before it by itself")
        return None
    # several where the job has steps or is an array: all end with it; without a limit it is no time
    with contextlib.suppress(ValueError, IndexError):
        return datetime.datetime.fromisoformat(told[0]).timestamp()
    return None
