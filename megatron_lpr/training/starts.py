"""Where, with what and when a run was started: one line of starts.jsonl for each start."""

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_lpr
from megatron_lpr.files.json_lines import JsonLines, utc_now
from megatron_lpr.platform import device
from megatron_lpr.training.run_files import Start

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "numpy")


def record_start(folder: str | Path, *, step: int) -> None:
    """Append this start to `folder`/starts.jsonl, on the disk when rank 0 returns; all ranks call it."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    if dist.get_rank() != 0:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    lines = JsonLines(Path(folder) / "starts.jsonl")
    lines.append(describe_start(hosts, step), sync=True)
    lines.close()


def describe_start(hosts: list[str], step: int) -> Start:
    """The record of this process, one of the ranks on `hosts` (a name for each rank)."""
    return Start(
        time=utc_now(),
        step=step,
        hosts=list(dict.fromkeys(hosts)),
        world_size=len(hosts),
        device=torch.cuda.get_device_name() if device().type == "cuda" else device().type,
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        command=shlex.join(sys.argv),
        working_folder=os.getcwd(),
        git=git_commit(Path(megatron_lpr.__file__).parent),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of Python, this package, and those packages of `PACKAGES` that are installed."""
    found: dict[str, Any] = {"python": platform.python_version(), "megatron_lpr": megatron_lpr.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with its CUDA


def git_commit(folder: Path) -> str | None:
    """The commit that a package's folder is at; None where it is not under git itself, but installed."""
    try:
        if not _git(folder, "ls-files", "__init__.py"):
            return None  # a virtual environment inside somebody else's repository
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository, or one that takes too long


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
