"""One run at a time in an output folder; the kernel frees it when its holder dies."""

import fcntl
import multiprocessing
import os
import signal
import socket

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.files.locks import LOCK_FILE, FolderLocks, holder_of, run_lock


def hold(output, pipe):
    with run_lock(output):
        pipe.send(os.getpid())
        pipe.recv()


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process that holds tmp_path/run, and the pipe that lets it go."""
    monkeypatch.setenv("SLURM_JOB_ID", "88")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(str(tmp_path / "run"), theirs))
    process.start()
    assert ours.recv() == process.pid
    yield process, ours
    process.kill()
    process.join()


def test_who_holds_a_folder_is_seen_without_touching_it(tmp_path, holder):
    process, pipe = holder
    said = holder_of(str(tmp_path / "run"))
    assert said.pop("since").startswith("20")
    assert said == {"host": socket.gethostname(), "pid": process.pid, "slurm_job": "88"}
    process.kill()
    process.join()
    assert (tmp_path / "run" / LOCK_FILE).is_file() and holder_of(str(tmp_path / "run")) is None
    assert holder_of(str(tmp_path / "elsewhere")) is None


def test_second_run_is_told_who_holds_it(tmp_path, holder):
    process, pipe = holder
    with pytest.raises(UserError) as refused, run_lock(str(tmp_path / "run")):
        pass
    expected = f"in use by another run (host {socket.gethostname()}, pid {process.pid}, slurm job 88, since 20"
    assert expected in str(refused.value) and "\n" not in str(refused.value)
    with run_lock(str(tmp_path / "other")):
        pass
    pipe.send(None)
    process.join()
    with run_lock(str(tmp_path / "run")):
        pass


def test_a_killed_holder_blocks_nobody(tmp_path, holder):
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "run" / LOCK_FILE).read_text()  # it says so still, and means nothing
    with run_lock(str(tmp_path / "run")):
        assert f'"pid": {os.getpid()}' in (tmp_path / "run" / LOCK_FILE).read_text()


def test_leaves_nothing_behind_but_what_the_run_wrote(tmp_path):
    with run_lock(str(tmp_path / "a/b")):
        assert [path.name for path in (tmp_path / "a/b").iterdir()] == [LOCK_FILE]
    assert not (tmp_path / "a/b").exists()
    with run_lock(str(tmp_path / "c")):
        (tmp_path / "c/file").touch()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["file"]


def test_a_lock_file_that_was_removed_meanwhile_is_not_the_lock(tmp_path, monkeypatch):
    """Its holder removes it between our open and our lock: we would hold a file that nobody else can see."""
    real, removed = fcntl.lockf, []

    def lockf(*arguments):
        if not removed:
            removed.append(os.unlink(tmp_path / LOCK_FILE))
        return real(*arguments)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with run_lock(str(tmp_path)):
        assert (tmp_path / LOCK_FILE).read_text() and removed


def test_file_system_without_locks_is_a_warning_and_the_file_says_who_holds_it(tmp_path, monkeypatch, capsys):
    def lock(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lock)
    monkeypatch.setattr(fcntl, "fcntl", lock)
    run = str(tmp_path / "run")
    with run_lock(run):
        assert holder_of(run)["pid"] == os.getpid()
    assert holder_of(run) is None
    assert "file system without locks" in capsys.readouterr().err


def test_a_lock_that_fails_is_told(tmp_path, monkeypatch):
    def lockf(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with FolderLocks(str(tmp_path)) as locks:
        for lock in (run_lock(str(tmp_path)), locks.manifest()):
            with pytest.raises(UserError, match=r"cannot be locked .Input/output error.; choose another folder"), lock:
                pass


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UserError, match="cannot be written .*; choose another folder"), run_lock(str(path)):
            pass
