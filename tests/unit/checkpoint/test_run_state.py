"""Which checkpoint a path means, which ones are complete, and run.json of other versions and after accidents."""

import dataclasses
import errno
import hashlib
import json
from pathlib import Path

import pytest
from edited import changed
from fake_checkpoints import BASE, RECIPE, write_fake_checkpoint

from megatron_lpr.checkpoint.manifest import sealed, write_manifest
from megatron_lpr.checkpoint.run_state import (
    VERSION,
    RunState,
    checkpoint_folder,
    find_checkpoint,
    locate,
    read_run_state,
    step_folders,
    write_run_state,
)
from megatron_lpr.errors import UserError

STATE = RunState(
    step=7, consumed_samples=28, has_optimizer=True, recipe=RECIPE, base=BASE, tokens_per_language={"hu": 3}
)


@pytest.fixture
def run(tmp_path):
    for step in (3, 7):
        write_fake_checkpoint(tmp_path / "run/checkpoints", step)
    (tmp_path / "run/checkpoints/latest").write_text("step_00000007\n")
    return tmp_path / "run"


def step(run, number):
    return run / f"checkpoints/step_{number:08d}"


def test_run_means_what_latest_names(run, capsys):
    found = find_checkpoint(str(run))
    assert checkpoint_folder(str(run)) == found.folder == step(run, 7) and found.note is None
    (run / "checkpoints/latest").write_text("step_00000003")  # rolled back
    assert checkpoint_folder(str(run)) == step(run, 3)
    assert capsys.readouterr() == ("", "")


def test_checkpoint_means_itself(run):
    assert checkpoint_folder(str(step(run, 3))) == step(run, 3)


def test_round_trip(run):
    state = dataclasses.replace(STATE, manifest="0" * 64)
    write_run_state(step(run, 7), state)
    assert read_run_state(step(run, 7)) == state
    assert not list(step(run, 7).glob(".run.json*"))


def test_no_checkpoint(tmp_path):
    assert find_checkpoint(str(tmp_path)) is None
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint_folder(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_folder(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "content, fault",
    [
        (None, "latest is missing"),
        ("", "names no checkpoint"),
        ("../elsewhere", "names no checkpoint"),
        (f"step_{'9' * 5000}", "names no checkpoint"),
        ("step_00000009", "names step_00000009, which is not there"),
        (b"\xff\xfe", "names no checkpoint"),
    ],
)
def test_newest_complete_one_where_latest_is_of_no_use(run, capsys, content, fault):
    latest = run / "checkpoints/latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = find_checkpoint(str(run))
    assert found.folder == step(run, 7)
    assert fault in found.note and "takes step_00000007, the newest complete checkpoint" in found.note
    assert checkpoint_folder(str(run)) == step(run, 7)
    assert capsys.readouterr().err == f"note: {found.note}\n"


@pytest.mark.parametrize("damage", ["no metadata.json", "no .metadata", "no run.json", "empty", "truncated", "types"])
def test_an_older_one_where_the_newest_is_damaged(run, damage):
    state = step(run, 7) / "run.json"
    match damage:
        case "empty":
            state.write_text("")
        case "truncated":
            state.write_text(state.read_text()[:-20])
        case "types":
            state.write_text(sealed(json.loads(state.read_text()) | {"step": "7"}))
        case _:
            (step(run, 7) / damage.removeprefix("no ")).unlink()
    found = find_checkpoint(str(run))
    what = damage if damage.startswith("no ") else "no readable run.json"
    assert found.folder == step(run, 3) and f"step_00000007, which is not complete ({what})" in found.note
    with pytest.raises(UserError, match=r"step_00000007: not complete \(no .*; give another checkpoint"):
        locate(str(step(run, 7)))


def test_checkpoints_of_which_none_is_complete_are_never_a_fresh_start(run):
    for number in (3, 7):
        (step(run, number) / ".metadata").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="none there is complete .*step_00000003 has no .metadata.*to start afresh"):
            find_checkpoint(str(run))
        (run / "checkpoints/latest").unlink(missing_ok=True)


def test_a_dangling_latest_alone_is_no_fresh_start(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step_00000003")
    with pytest.raises(UserError, match="none there is complete"):
        find_checkpoint(str(tmp_path))


def test_steps_are_numbers(tmp_path):
    for number in (999_999_999, 5, 1_000_000_000):
        write_fake_checkpoint(tmp_path, number)
    (tmp_path / "step_x").mkdir()
    assert [int(folder.name[5:]) for folder in step_folders(tmp_path)] == [5, 999_999_999, 1_000_000_000]


def test_run_json_of_other_versions(run):
    file = step(run, 7) / "run.json"
    tree = json.loads(file.read_text())
    assert tree["version"] == VERSION
    file.write_text(sealed(tree | {"content": "over there"}))
    with pytest.raises(UserError, match="run.json is damaged"):
        read_run_state(step(run, 7))
    model = {key: value for key, value in tree["recipe"]["model"].items() if key != "dtype"}
    file.write_text(sealed(tree | {"recipe": tree["recipe"] | {"model": model}}))  # every version named it
    with pytest.raises(UserError, match=r"recipe\.model\.dtype is not what a run writes"):
        read_run_state(step(run, 7))
    file.write_text(sealed(tree | {"new_key": [1]}))
    assert read_run_state(step(run, 7)).step == 7
    file.write_text(sealed(tree | {"version": VERSION + 1}))
    assert find_checkpoint(str(run)).folder == step(run, 7)  # not damaged: no older one in its place
    with pytest.raises(UserError, match=r"newer megatron-lpr \(format 5, this one reads up to 4\); update"):
        read_run_state(step(run, 7))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"step": 1}', "[" * 20])
def test_run_json_that_cannot_be_read_is_a_sentence(run, content):
    file = step(run, 7) / "run.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=f"run.json is {'missing' if content is None else 'damaged'}"):
        read_run_state(step(run, 7))


@pytest.mark.parametrize(
    "entry, value",
    [
        ("recipe", []),
        ("recipe.model", [None]),
        ("recipe.model.topk", "2"),
        ("recipe.model.num_experts", ...),
        ("recipe.train", {"trainable": 1}),
        ("recipe.preprocess", [1]),
        ("data_state.schedule.0", float("nan")),
        ("data_state.corpora.hu", {"role": "expanded"}),
        ("tokens_per_language.hu", "many"),
        ("skipped_steps", 10**30),
        ("base", "x"),
        ("base.files.a.bytes", None),
        ("source.run", ...),
        ("content", "over there"),
        ("version", True),
        ("step", -1),
    ],
)
def test_an_entry_of_another_kind_is_named(run, entry, value):
    """Somebody has written the digest anew."""
    file = step(run, 7) / "run.json"
    tree = json.loads(file.read_text())
    tree["recipe"] |= {"train": {"trainable": "all", "steps": 9, "global_batch_size": 4}, "preprocess": {"bos": "true"}}
    corpus = {"digest": "d", "language": "hu", "role": "expanded", "tokens": 5}
    data = {
        "version": 3,
        "consumed_samples": 28,
        "schedule": [{"from_sample": 0, "shares": {"hu": "1"}}],
        "corpora": {"hu": corpus},
    }
    base = BASE | {"files": {"a": {"bytes": 5, "sha256": "s"}}}
    tree |= {"data_state": data, "base": base, "source": {"folder": "f", "run": "r", "tokens": None}}
    tree["tokens_per_language"] = {"hu": 3}
    file.write_text(sealed(tree))
    assert read_run_state(step(run, 7)).step == 7
    changed(tree, entry, value)
    file.write_text(sealed(tree))
    with pytest.raises(UserError, match=rf"run.json is damaged \({entry}[.a-z_]* is not what a run writes\); give ano"):
        read_run_state(step(run, 7))
    assert find_checkpoint(str(run)).folder == step(run, 3)


@pytest.mark.parametrize(
    "content", ["[]", "5", "{}", '{"files": 5}', '{"files": {"a": 5}}', '{"files": {"a": {}}}', "{"]
)
def test_a_manifest_that_is_none_is_damaged_whatever_its_digest(run, content):
    (step(run, 7) / "manifest.json").write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    write_run_state(step(run, 7), dataclasses.replace(STATE, manifest=digest))
    with pytest.raises(UserError, match=r"step_00000007: not complete \(a damaged manifest.json\)"):
        locate(str(step(run, 7)))


@pytest.mark.parametrize("name", ["run.json", "manifest.json"])
def test_without_the_right_to_read_it_no_older_one_is_taken(run, monkeypatch, name):
    """Read as by somebody who has not every right, as those who run tests may."""
    digest = write_manifest(step(run, 7), {})
    write_run_state(step(run, 7), dataclasses.replace(STATE, manifest=digest))
    read = {"run.json": Path.read_text, "manifest.json": Path.read_bytes}[name]

    def refused(path, *arguments, **more):
        if path == step(run, 7) / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *arguments, **more)

    assert find_checkpoint(str(run)).folder == step(run, 7)
    monkeypatch.setattr(Path, read.__name__, refused)
    with pytest.raises(PermissionError):
        find_checkpoint(str(run))
