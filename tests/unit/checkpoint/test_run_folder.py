"""What is kept, dropped and set aside of a run's checkpoints, and what a kill at any moment leaves."""

import shutil

import pytest
from fake_checkpoints import write_fake_checkpoint

from megatron_lpr.checkpoint.run_folder import clear_leavings, drop_old, publish, set_future_aside
from megatron_lpr.checkpoint.run_state import find_checkpoint
from megatron_lpr.files import durable


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(root):
    return [int(name[5:]) for name in names(root) if name.startswith("step_")]


def writing(root, step):
    folder = write_fake_checkpoint(root, step)
    return folder.rename(root / f".writing_{folder.name}")


def test_publish_names_the_checkpoint(root):
    publish(writing(root, 4), root / "step_00000004")
    assert names(root) == ["latest", "step_00000004"]
    assert find_checkpoint(str(root.parent)).note is None


def test_publish_never_deletes_what_has_the_name_already(root):
    (write_fake_checkpoint(root, 4) / "old").touch()
    publish(writing_again(root), root / "step_00000004")
    assert not (root / "step_00000004/old").exists()
    [place] = (root / "abandoned").iterdir()
    assert (place / "step_00000004/old").exists()


def writing_again(root):
    folder = write_fake_checkpoint(root.parent / "elsewhere", 4)
    return folder.rename(root / f".writing_{folder.name}")


@pytest.mark.parametrize("moment", ["rename", "write_text"])
def test_a_kill_while_publishing_leaves_a_checkpoint(root, monkeypatch, moment):
    publish(writing(root, 2), root / "step_00000002")

    def killed(*_):
        raise KeyboardInterrupt

    new = writing(root, 4)
    with monkeypatch.context() as patch:
        patch.setattr(type(root), "rename", killed) if moment == "rename" else patch.setattr(
            durable, "write_text", killed
        )
        with pytest.raises(KeyboardInterrupt):
            publish(new, root / "step_00000004")
    assert find_checkpoint(str(root.parent)).folder == root / "step_00000002"
    clear_leavings(root)
    (root / "latest").unlink()
    newest = 2 if moment == "rename" else 4
    assert find_checkpoint(str(root.parent)).folder == root / f"step_{newest:08d}"


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4]), (1, [3, 4]), (2, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_up_to_the_one_just_written_are_kept(root, keep, left):
    for step in (1, 2, 3, 4):
        write_fake_checkpoint(root, step)
    drop_old(root / "step_00000003", keep)  # step 4 is another line of the run
    assert steps(root) == left


def test_incomplete_checkpoints_neither_count_nor_go(root):
    for step in (1, 2, 3):
        write_fake_checkpoint(root, step)
    (root / "step_00000002/.metadata").unlink()
    drop_old(root / "step_00000003", keep=2)
    assert steps(root) == [1, 2, 3]
    drop_old(root / "step_00000003", keep=1)
    assert steps(root) == [2, 3]


def test_what_is_dropped_and_not_deleted_yet_does_not_look_like_a_checkpoint(root):
    for step in (1, 2):
        write_fake_checkpoint(root, step)
    [dropped] = drop_old(root / "step_00000002", keep=1)
    (dropped / "__0_0.distcp").unlink()
    assert steps(root) == [2]
    assert clear_leavings(root) == [".dropping_step_00000001"]


def test_an_abandoned_future_is_set_aside_and_said(root):
    for step in (1, 2, 3):
        write_fake_checkpoint(root, step)
    (root / "step_00000003/run.json").unlink()
    assert set_future_aside(root, 3) is None
    sentence = set_future_aside(root, 1)
    [place] = (root / "abandoned").iterdir()
    assert "set aside step_00000002, step_00000003, beyond the step that the run resumes at" in sentence
    assert str(place) in sentence and names(place) == ["step_00000002", "step_00000003"] and steps(root) == [1]
    write_fake_checkpoint(root, 2)
    set_future_aside(root, 1)
    assert len(names(root / "abandoned")) == 2


def test_leavings_of_killed_saves_are_cleared_and_nothing_else(root):
    write_fake_checkpoint(root, 1)
    writing(root, 2)
    for name in (".latest", ".latest.partial", "latest", "notes.txt"):
        (root / name).touch()
    assert clear_leavings(root) == [".latest", ".latest.partial", ".writing_step_00000002"]
    assert names(root) == ["latest", "notes.txt", "step_00000001"]
    shutil.rmtree(root)
    assert clear_leavings(root) == []


def test_of_a_checkpoint_on_another_disk_the_link_goes_and_the_files_stay(root, tmp_path):
    """Somebody has moved it there; rotation drops it, and the next start of the run clears what is left."""
    there = write_fake_checkpoint(tmp_path / "bulk", 1)
    newest = write_fake_checkpoint(root, 2)
    (root / there.name).symlink_to(there)
    [dropped] = drop_old(newest, keep=1)
    shutil.rmtree(dropped, ignore_errors=True)  # as the thread does that deletes
    assert clear_leavings(root) == [".dropping_step_00000001"]
    assert names(root) == ["step_00000002"] and (there / "run.json").is_file()
