"""Output folders of every kind: absent, empty, mount points, links, read-only; where nothing can be renamed."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.files.new_folder import complete_folder
from megatron_lpr.files.output_place import INSIDE, check_file, check_place, check_vacant

FILES = ["config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.json"]


def write(out):
    with complete_folder(out) as folder:
        for name in FILES:
            (folder / name).write_text(name)
    assert sorted(path.name for path in out.iterdir() if path.name != "lost+found") == FILES


@pytest.fixture
def mounted(tmp_path):
    """A file system of 1 MB, mounted on an empty folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def refuse_renaming(monkeypatch, what, code):
    """rename() that fails for folders, or for all."""
    rename = os.rename

    def refuse(source, target, **options):
        if what == "all" or os.path.isdir(source):
            raise OSError(code, os.strerror(code))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)


def test_a_mount_point_is_filled_in_place(mounted, tmp_path):
    (mounted / "lost+found").mkdir()
    write(mounted)
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_the_space_that_counts_is_that_of_the_mount_point(mounted):
    check_place(mounted, needed=10**5)
    with pytest.raises(UserError, match=f"'{mounted}' has 0.0 GB free, the checkpoint needs 0.0 GB"):
        check_place(mounted, needed=10**7)


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
@pytest.mark.parametrize("there", [True, False])
def test_where_folders_cannot_be_renamed(tmp_path, monkeypatch, code, there):
    refuse_renaming(monkeypatch, "folders", code)
    out = tmp_path / "deep" / "out"
    if there:
        out.mkdir(parents=True)
    write(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_where_nothing_can_be_renamed_is_known_before_the_work(tmp_path, monkeypatch):
    refuse_renaming(monkeypatch, "all", errno.ENOSYS)
    with pytest.raises(UserError, match="cannot write .*out': Function not implemented"):
        with complete_folder(tmp_path / "deep" / "out"):
            raise AssertionError("the work was begun")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["empty", "nothing"])
def test_a_link(tmp_path, target):
    if target == "empty":
        (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "there/config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]


def test_an_empty_folder_stays_the_one_that_it_was(tmp_path):
    """With the owner and the permissions that somebody gave it."""
    out = tmp_path / "out"
    out.mkdir(mode=0o2770)
    inode = out.stat().st_ino
    write(out)
    assert out.stat().st_ino == inode


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("end", [KeyboardInterrupt, UserError, OSError(28, "No space left on device")])
def test_nothing_is_left_of_what_fails(tmp_path, there, end):
    out = tmp_path / "deep" / "out"
    if there:
        out.mkdir(parents=True)
    with pytest.raises((KeyboardInterrupt, UserError)), complete_folder(out) as folder:
        (folder / "half").write_text("")
        raise end
    assert list(tmp_path.rglob("*")) == ([out.parent, out] if there else [])


def test_what_a_killed_process_left_inside_is_replaced(tmp_path):
    (tmp_path / "out" / INSIDE).mkdir(parents=True)
    (tmp_path / "out" / INSIDE / "half").touch()
    write(tmp_path / "out")


@pytest.fixture
def ended_at_the_index(tmp_path, monkeypatch):
    """ended_at_the_index(end): `end` is raised in the folder `out` when the index has been moved."""
    (tmp_path / "out").mkdir()
    rename = os.rename

    def run(end: type[BaseException]) -> list[Path]:
        def move(source, target, **options):
            rename(source, target, **options)
            if str(target).endswith("index.json"):
                raise end

        monkeypatch.setattr(os, "rename", move)
        with pytest.raises(end):
            write(tmp_path / "out")
        return list((tmp_path / "out").iterdir())

    return run


def test_files_come_in_an_order_that_makes_no_half_model(tmp_path, ended_at_the_index):
    """Killed while the files are moved: config.json is not there, and the next run says what lies there."""
    assert {path.name for path in ended_at_the_index(SystemExit)} == {*FILES, INSIDE} - {"config.json"}
    with pytest.raises(UserError, match="holds part of an export that was killed .* remove what is in the folder"):
        check_vacant(tmp_path / "out")


def test_interrupted_while_the_files_are_moved(ended_at_the_index):
    assert ended_at_the_index(KeyboardInterrupt) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_complete_folder_is_not_deleted_when_its_place_is_taken(tmp_path, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(UserError, match="is written and complete but could not be put in place, and stays in") as told:
        with complete_folder(out) as folder:
            (folder / "config.json").write_text("x")
            out.mkdir(exist_ok=True)
            (out / "of the user").touch()
    assert (folder / "config.json").read_text() == "x" and str(folder) in str(told.value)
    assert (out / "of the user").is_file()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file' is a file: choose another name"), complete_folder(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="out' cannot be made: '.*file' is a file"):
        check_place(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot write .*out': File exists"), complete_folder(tmp_path / "file" / "out"):
        pass


def test_a_place_in_what_is_read(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    for out in ("base", "base/out", "link/deep/out", "other/../base"):
        with pytest.raises(UserError, match="is or lies in '.*base', which is read"):
            check_place(tmp_path / out, tmp_path / "base")
    check_place(tmp_path / "base2", tmp_path / "base")


def test_a_read_only_place(mounted):
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(UserError, match=f"no right to write in '{mounted}', or it is read-only"):
        check_place(mounted / "deep" / "out")
    with pytest.raises(UserError, match="cannot write .*Read-only file system"), complete_folder(mounted):
        pass


@pytest.mark.parametrize("check", [check_place, check_file])
def test_a_home_folder_that_no_shell_has_read(tmp_path, monkeypatch, check):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'~/runs': ~ is the home folder for a shell"):
        check("~/runs")
    for out in ("$SCRATCH/runs", "runs/${NAME}", Path("s3://bucket/runs")):
        with pytest.raises(UserError, match="neither variables of a shell nor addresses are read here"):
            check(out)
    (tmp_path / "~/runs").mkdir(parents=True)
    check_place("~/runs")  # a run that goes on there


def test_paths_that_mean_nothing(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop"):
        check_place(tmp_path / "loop" / "out")
    with pytest.raises(UserError, match="too long"):
        check_place(tmp_path / ("x" * 300))
