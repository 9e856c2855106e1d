"""Every kind of damage to every file of a checkpoint is found, and named."""

import os
import shutil

import pytest
from fake_checkpoints import BASE, RECIPE, seal

from megatron_lpr.checkpoint import run_state, verification
from megatron_lpr.checkpoint.run_state import RunState, find_checkpoint, read_run_state
from megatron_lpr.checkpoint.verification import faults_of_all, refuse_damaged, verify_files
from megatron_lpr.errors import UserError
from megatron_lpr.files import checksum

CONTENT = {"metadata.json": b"{}", ".metadata": b"\x80", "__0_0.distcp": bytes(range(256)) * 40, "__1_0.distcp": b"abc"}
FILES = [*CONTENT, "manifest.json", "run.json"]


def write_checkpoint(root, step):
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    recipe = {**RECIPE, "lr": 1e-4}
    seal(folder, RunState(step=step, consumed_samples=4 * step, has_optimizer=True, recipe=recipe, base=BASE))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "run/checkpoints", 7)


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


DAMAGE = {
    "flipped": lambda file: flip(file, len(file.read_bytes()) * 8 - 12),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "emptied": lambda file: file.write_bytes(b""),
    "removed": lambda file: file.unlink(),
}


def test_an_undamaged_one_is_good(folder):
    assert verify_files(folder) == ""
    refuse_damaged(folder, contents=True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence_that_names_the_file(folder, name, damage):
    DAMAGE[damage](folder / name)
    with pytest.raises(UserError, match="^checkpoint .*another checkpoint of the run$") as error:
        refuse_damaged(folder, contents=True)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_what_may_not_be_read_is_not_damaged(folder, monkeypatch):
    """Its run would be set back to the checkpoint before it, by somebody else who goes on with it."""

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checksum, "file_checksum", refused)
    with pytest.raises(UserError, match=r"^cannot read .*/__0_0.distcp: Permission denied; ask its owner"):
        verify_files(folder)


@pytest.mark.parametrize("name", ["run.json", "manifest.json"])
def test_no_byte_of_the_small_files_changes_unnoticed(folder, name):
    content = (folder / name).read_bytes()
    for bit in range(0, len(content) * 8, 7):  # one of each byte or more, and all eight places in turn
        flip(folder / name, bit)
        with pytest.raises(UserError):
            refuse_damaged(folder, contents=False)
        (folder / name).write_bytes(content)
    refuse_damaged(folder, contents=True)


def test_sizes_are_looked_at_without_checksums_too(folder):
    flip(folder / "__0_0.distcp", 100)
    assert verify_files(folder, contents=False) == ""
    assert verify_files(folder) == "__0_0.distcp is damaged: its bytes are not those that were written"
    DAMAGE["cut"](folder / "__0_0.distcp")
    DAMAGE["emptied"](folder / "__1_0.distcp")
    found = verify_files(folder, contents=False)
    assert found == "__0_0.distcp has 10,239 bytes in place of 10,240, and 1 more"


def test_what_is_damaged_is_passed_over_for_the_newest_good_one_before_it(tmp_path):
    root = tmp_path / "run/checkpoints"
    for step in (3, 5, 7, 9):
        write_checkpoint(root, step)
    (root / "latest").write_text("step_00000007")  # rolled back
    found = find_checkpoint(str(tmp_path / "run"), {"step_00000007": "__0_0.distcp is missing"})
    assert found.folder == root / "step_00000005"
    assert "names step_00000007, which is damaged (__0_0.distcp is missing): takes step_00000005" in found.note
    others = {f"step_0000000{step}": "x is damaged" for step in (3, 5, 7)}
    assert find_checkpoint(str(tmp_path / "run"), others).folder == root / "step_00000009"
    with pytest.raises(UserError, match=r"none there is complete .*step_00000009 is damaged \(.*to start afresh"):
        find_checkpoint(str(tmp_path / "run"), others | {"step_00000009": "y is missing"})


def test_run_json_comes_back(folder):
    assert read_run_state(folder).recipe == {**RECIPE, "lr": 1e-4}


@pytest.fixture(params=["listed", "compared"])
def deleted(request, monkeypatch):
    """deleted(folder): the run of a checkpoint deletes it at a moment at which somebody reads it."""

    def when(folder):
        module, name = {"listed": (run_state, "read_manifest"), "compared": (verification, "fault_of_file")}[
            request.param
        ]
        real = getattr(module, name)

        def slow(path, *arguments, **more):
            found = real(path, *arguments, **more) if request.param == "listed" else None
            if folder in (path, path.parent):
                shutil.rmtree(folder, ignore_errors=True)
            return found or real(path, *arguments, **more)

        monkeypatch.setattr(module, name, slow)

    return when


def test_one_that_its_run_deletes_while_it_is_read_is_one_sentence(folder, deleted):
    deleted(folder)
    with pytest.raises(UserError, match="^checkpoint .*step_00000007: was deleted or moved while it was read"):
        refuse_damaged(folder, contents=True)


def test_one_that_its_run_deletes_meanwhile_is_no_damage_of_the_run(folder, deleted):
    write_checkpoint(folder.parent, 8)
    deleted(folder)
    told = []
    assert faults_of_all(folder.parents[1], told.append) == 0
    assert told[0].startswith("step_00000007: not there any more") and told[1].startswith("step_00000008: 6 files")


def test_a_run_that_deletes_what_latest_named_has_a_newer_one(folder, monkeypatch):
    newer, listdir = write_checkpoint(folder.parent, 8), os.listdir
    (folder.parent / "latest").write_text(folder.name)

    def rotated(path):
        shutil.rmtree(folder, ignore_errors=True)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", rotated)
    assert find_checkpoint(str(folder.parents[1])).folder == newer
