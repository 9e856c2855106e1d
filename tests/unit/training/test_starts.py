"""starts.jsonl: where and with what a run was started."""

import json
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_lpr
from megatron_lpr.testing.run_distributed import run_distributed
from megatron_lpr.training.run_files import Start
from megatron_lpr.training.starts import describe_start, git_commit, record_start, versions


def starts(folder):
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def test_every_start_adds_a_line(megatron, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megatron-lpr", "train", "my recipe.yaml"])
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    record_start(tmp_path / "run", step=0)
    monkeypatch.delenv("SLURM_JOB_ID")
    record_start(tmp_path / "run", step=24)
    first, second = starts(tmp_path / "run")
    assert first.keys() == Start.__annotations__.keys() == second.keys()
    assert (first["step"], first["slurm_job_id"]) == (0, "4711")
    assert (second["step"], second["slurm_job_id"]) == (24, None)
    assert first["time"] <= second["time"]
    assert (first["hosts"], first["world_size"]) == ([socket.gethostname()], 1)
    assert first["command"] == "megatron-lpr train 'my recipe.yaml'"
    assert first["working_folder"] == str(Path.cwd())
    assert first["device"]


def test_a_line_torn_by_a_kill_does_not_take_the_next_with_it(megatron, tmp_path):
    (tmp_path / "starts.jsonl").write_text('{"time": "2026')
    record_start(tmp_path, step=0)
    assert json.loads((tmp_path / "starts.jsonl").read_text().splitlines()[1])["step"] == 0


def test_hosts_are_named_once_in_the_order_of_the_ranks():
    start = describe_start(["b", "b", "a", "a"], 0)
    assert (start["hosts"], start["world_size"]) == (["b", "a"], 4)


def start_on_rank(folder):
    from megatron_lpr.platform import megatron

    with megatron() as ranks:
        socket.gethostname = lambda: f"node{ranks.rank // 2}"
        record_start(folder, step=3)


def test_one_line_for_all_ranks(tmp_path):
    run_distributed(start_on_rank, 3, tmp_path)
    (start,) = starts(tmp_path)
    assert (start["hosts"], start["world_size"], start["step"]) == (["node0", "node1"], 3, 3)


def test_versions():
    found = versions()
    assert found["python"] == platform.python_version()
    assert (found["megatron_lpr"], found["torch"]) == (megatron_lpr.__version__, torch.__version__)
    assert found.keys() >= {"megatron-core", "transformers"}


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_the_package_not_of_a_repository_around_it(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package, installed = tmp_path / "package", tmp_path / "venv/package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    assert git_commit(package) is None
    git("init")
    git("add", "package")
    git("commit", "-m", "x")
    git("tag", "-a", "v1", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert git_commit(package) == commit and git_commit(installed) is None
    (package / "__init__.py").write_text("changed")
    assert git_commit(package) == f"{commit}-dirty"
