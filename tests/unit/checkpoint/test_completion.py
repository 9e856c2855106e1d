"""A save that a crash cuts off when every rank has written its share is completed at the next start, or not at all."""

import errno
import shutil
import subprocess
import sys
import time

import pytest
from harness import make_trainer

from megatron_lpr.checkpoint.completion import complete_saves, cut_off
from megatron_lpr.checkpoint.run_folder import clear_leavings
from megatron_lpr.checkpoint.run_state import find_checkpoint
from megatron_lpr.checkpoint.verification import refuse_damaged
from megatron_lpr.errors import UserError
from megatron_lpr.files.checksum import ChecksummedFile

NAME = "step_00000002"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def crashed(megatron, toy_base, tmp_path):
    """<tmp_path>/checkpoints after a crash in the save of step 2, and what that checkpoint should be, in `expected`."""
    trainer = make_trainer(toy_base, tmp_path)
    trainer.train_step()
    trainer.save()
    trainer.train_step()
    root = tmp_path / "checkpoints"
    trainer.save(wait=False)
    while not trainer.writer.has_ended:
        time.sleep(0.01)
    writing = root / f".writing_{NAME}"
    assert not (root / NAME).exists()
    shutil.copytree(writing, tmp_path / "writing")
    trainer.finish_save()
    (root / NAME).rename(tmp_path / "expected")
    (tmp_path / "writing").rename(writing)
    (root / "latest").write_text("step_00000001")
    return root


def test_it_becomes_the_checkpoint_that_it_was_to_be(crashed, tmp_path):
    assert [place.name for place in cut_off(crashed)] == [f".writing_{NAME}"]
    assert complete_saves(str(tmp_path)) == [NAME]
    assert content(crashed / NAME) == content(tmp_path / "expected")
    assert sorted(path.name for path in (crashed / NAME).iterdir() if path.is_dir()) == []
    refuse_damaged(crashed / NAME, contents=True)
    assert '".metadata"' in (crashed / NAME / "manifest.json").read_text()
    assert find_checkpoint(str(tmp_path)).folder == crashed / NAME
    assert complete_saves(str(tmp_path)) == []


def missing_share(root):
    (root / f".writing_{NAME}/.shares/0").unlink()


def cut_share(root):
    share = root / f".writing_{NAME}/.shares/0"
    share.write_bytes(share.read_bytes()[:-20])


def cut_file(root):
    file = max((root / f".writing_{NAME}").glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def missing_file(root):
    next((root / f".writing_{NAME}").glob("*.distcp")).unlink()


def turned_back(root):
    """The user has gone back to another checkpoint: what was being written belongs to another future."""
    (root / "latest").write_text("step_00000000")


@pytest.mark.parametrize("accident", [missing_share, cut_share, cut_file, missing_file, turned_back])
def test_it_stays_what_it_is_where_anything_is_missing(crashed, tmp_path, accident):
    accident(crashed)
    pointer = (crashed / "latest").read_text()
    assert not cut_off(crashed)
    assert complete_saves(str(tmp_path)) == []
    assert not (crashed / NAME).exists() and (crashed / "latest").read_text() == pointer


HOLD = """import sys; from megatron_lpr.files.locks import run_lock
with run_lock(sys.argv[1]): print(flush=True); input()"""


def test_of_a_run_that_still_goes_on_nothing_is_taken(crashed, tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(UserError, match="in use by another run"):
            complete_saves(str(tmp_path))
        other.stdin.close()
    assert cut_off(crashed) and not (crashed / NAME).exists()


def test_a_crash_around_the_last_renames_is_mended_too(crashed, tmp_path):
    """It has its run.json already, and its name; but `latest` does not know."""
    for name in ("run.json", "manifest.json", ".metadata"):
        shutil.copy(tmp_path / "expected" / name, crashed / f".writing_{NAME}")
    (crashed / f".writing_{NAME}").rename(crashed / NAME)
    assert complete_saves(str(tmp_path)) == [NAME]
    assert content(crashed / NAME) == content(tmp_path / "expected")
    assert (crashed / "latest").read_text() == NAME and not (crashed / "abandoned").exists()


def test_what_a_crash_leaves_in_a_checkpoint_goes(crashed, tmp_path):
    (crashed / f".writing_{NAME}").rename(crashed / NAME)
    (crashed / "latest").write_text(NAME)
    assert complete_saves(str(tmp_path)) == []
    assert clear_leavings(crashed) == [".shares"] and not (crashed / NAME / ".shares").exists()


def test_a_full_disk_is_one_sentence_and_costs_nothing(crashed, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(ChecksummedFile, "write", refuse)
        with pytest.raises(UserError, match="which cannot be completed: No space left on device; make room or"):
            complete_saves(str(tmp_path))
    assert complete_saves(str(tmp_path)) == [NAME]
