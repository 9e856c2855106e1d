"""The end of a Slurm job: from the environment, from squeue, or from nobody."""

import datetime
import os

import pytest

from megatron_lpr.platform.time_limit import job_end


@pytest.fixture
def squeue(monkeypatch, tmp_path):
    """squeue(text, status): the only program there is, and what it prints."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def there(text, status=0):
        program = tmp_path / "squeue"
        program.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        os.chmod(program, 0o755)

    return there


def test_the_environment_says_it(squeue, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800000000")
    assert job_end() == 1800000000
    monkeypatch.delenv("SLURM_JOB_ID")
    assert job_end() is None  # left over


def test_squeue_says_it(squeue, capsys):
    squeue("2026-11-26T03:00:00")
    assert job_end() == datetime.datetime(2026, 11, 26, 3).timestamp()
    squeue("N/A")
    assert job_end() is None and capsys.readouterr().err == ""


def test_nobody_says_it(squeue, capsys):
    assert job_end() is None
    squeue("slurm_load_jobs error", status=1)
    assert job_end() is None
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(
        w.startswith("warning: the time limit of Slurm job 7 is not known") for w in warnings
    )
