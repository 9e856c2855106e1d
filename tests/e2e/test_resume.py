"""Resuming through the command line: rolled back, after accidents, finished, changed, and two runs at once."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_checkpoints import seal

from megatron_lpr import cli
from megatron_lpr.checkpoint.manifest import sealed
from megatron_lpr.checkpoint.run_state import read_run_state
from megatron_lpr.files import output_place
from megatron_lpr.platform import distributed
from megatron_lpr.reporting.metrics_log import read_metrics
from megatron_lpr.testing.equal_runs import differences


def changed(*assignments):
    return [argument for assignment in assignments for argument in ("--set", assignment)]


@pytest.fixture(scope="module")
def done(project, trained, tmp_path_factory):
    """Stage 2 of 6 steps, with checkpoints of the steps 2, 4 and 6 and a stage 1 of its own to start from."""
    root = tmp_path_factory.mktemp("done")
    shutil.copytree(project.root / "stage1", root / "stage1")
    settings = changed(f"output={root}/run", f"model.load={root}/stage1", "checkpoint.every=2", "checkpoint.keep=0")
    project.run("train", "stage2", *settings)
    return root


@pytest.fixture
def run(done, tmp_path, project, capsys):
    """run(*settings) -> (exit status, printed, error) of the same run started again, in a copy of its folder."""
    shutil.copytree(done, tmp_path / "copy", dirs_exist_ok=True)

    def start(*assignments):
        usual = [f"output={tmp_path}/copy/run", f"model.load={done}/stage1", "checkpoint.every=2", "checkpoint.keep=0"]
        status = cli.main(["train", str(project.recipes["stage2"]), *changed(*usual, *assignments)])
        printed, error = capsys.readouterr()
        return status, printed, error

    start.folder = tmp_path / "copy/run"
    start.checkpoints = tmp_path / "copy/run/checkpoints"
    return start


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


def roll_back(run, step):
    (run.checkpoints / "latest").write_text(f"step_{step:08d}")


def no_work(*arguments, **options):
    raise AssertionError("joined the process group")


def test_rolled_back_run_sets_its_future_aside_and_keeps_what_it_writes(run, done):
    roll_back(run, 2)
    status, printed, _ = run("checkpoint.keep=2")
    assert status == 0 and "resumes at step 2" in printed
    [place] = (run.checkpoints / "abandoned").iterdir()
    assert f"set aside step_00000004, step_00000006, beyond the step that the run resumes at, to {place}" in printed
    assert steps(place) == [4, 6] and steps(run.checkpoints) == [4, 6]
    assert (run.checkpoints / "latest").read_text() == "step_00000006"
    losses = [[record["ntp_loss"] for record in read_metrics(f / "metrics.jsonl")] for f in (run.folder, done / "run")]
    assert losses[0] == losses[1]


def test_lost_pointer_and_damaged_newest(run):
    (run.checkpoints / "latest").unlink()
    (run.checkpoints / "step_00000006/run.json").write_text("")
    (run.checkpoints / ".writing_step_00000006").mkdir()
    status, printed, _ = run()
    assert status == 0 and "latest is missing: takes step_00000004, the newest complete checkpoint" in printed
    assert "resumes at step 4" in printed and "set aside step_00000006" in printed
    assert "deleted .writing_step_00000006" in printed
    assert steps(run.checkpoints) == [2, 4, 6] and not list(run.checkpoints.glob(".w*"))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_one_flipped_bit_costs_the_steps_since_the_checkpoint_before(run, done):
    share = run.checkpoints / "step_00000006/__0_0.distcp"
    flip(share)
    assert cli.main(["verify", str(run.folder)]) == 2
    status, printed, _ = run()
    assert status == 0 and "resumes at step 4" in printed
    fault = "__0_0.distcp is damaged: its bytes are not those that were written"
    assert f"names step_00000006, which is damaged ({fault}): takes step_00000004" in printed
    [place] = (run.checkpoints / "damaged").iterdir()
    assert f"set aside step_00000006 to {place} (step_00000006 is damaged ({fault}))" in printed
    assert steps(place) == [6] and steps(run.checkpoints) == [2, 4, 6]
    for folder in (run.checkpoints, done / "run/checkpoints"):
        assert cli.main(["verify", str(folder / "step_00000006")]) == 0
    assert not differences(run.folder, done / "run")


def test_damage_to_every_checkpoint_is_no_fresh_start(run, monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "join", no_work)
    for folder in run.checkpoints.glob("step_*"):
        flip(folder / "__0_0.distcp")
    before = sorted(run.folder.rglob("*"))
    status, _, error = run("train.steps=8")
    assert status == 2 and "none there is complete (" in error and error.count("__0_0.distcp is damaged") == 4
    assert sorted(run.folder.rglob("*")) == before
    fresh = [f"output={tmp_path}/fresh", f"model.load={run.folder}"]
    status, _, error = run("train.steps=8", *fresh)
    assert status == 2 and "step_00000006: __0_0.distcp is damaged: " in error and not (tmp_path / "fresh").exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_any_work(run, monkeypatch):
    monkeypatch.setattr(distributed, "join", no_work)
    monkeypatch.setattr(output_place.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**3))
    before = sorted(run.folder.rglob("*"))
    status, _, error = run("train.steps=8")
    assert status == 2 and f"output folder '{run.checkpoints}': " in error and "make room, or choose another" in error
    assert sorted(run.folder.rglob("*")) == before
    assert run()[0] == 0  # it has nothing to write


def test_no_complete_checkpoint_is_no_fresh_start(run, monkeypatch):
    monkeypatch.setattr(distributed, "join", no_work)
    for folder in run.checkpoints.glob("step_*"):
        (folder / ".metadata").unlink()
    (run.checkpoints / "latest").unlink()
    before = sorted(run.folder.rglob("*"))
    status, _, error = run()
    assert status == 2 and "none there is complete" in error and sorted(run.folder.rglob("*")) == before


def test_finished_run_has_nothing_to_do(run, monkeypatch):
    monkeypatch.setattr(distributed, "join", no_work)
    before = sorted(run.folder.rglob("*"))
    status, printed, error = run()
    assert (status, error) == (0, "")
    assert printed.startswith(f"nothing to do: the run in {run.folder} has made all its 6 steps")
    assert sorted(run.folder.rglob("*")) == before
    status, _, error = run("optimizer.lr=0.5")
    assert status == 2 and "optimizer.lr: 0.5, but the run in" in error
    (run.checkpoints / "latest").write_text("step_00000008")
    status, printed, _ = run()
    assert status == 0 and printed.startswith("nothing to do: the run in ")
    assert "latest names step_00000008, which is not there: takes step_00000006, the newest complete" in printed


def test_a_finished_run_that_read_in_another_order_has_nothing_to_do(run):
    file = run.checkpoints / "step_00000006/run.json"
    state = json.loads(file.read_text())
    state["data_state"]["version"] = 1
    file.write_text(sealed(state))
    status, printed, _ = run()
    assert status == 0 and printed.startswith("nothing to do: the run in ")
    status, _, error = run("train.steps=8")
    assert status == 2 and "reads samples in another order (version 1" in error


@pytest.mark.parametrize(
    "assignment, start",
    [
        ("model.topk=1", "model.topk: 1, but the run in"),
        ("train.trainable=new_experts_and_routers", "train.trainable: new_experts_and_routers, but the run in"),
        ("lpr.coeff=0.3", "lpr.coeff: 0.3, but the run in"),
        ("train.global_batch_size=8", "train.global_batch_size: 8, but the run in"),
        ("data.reset_attention=true", "data.reset_attention: True, but the run in"),
        ("model.load=null", "model.load: not set, but the run in"),
    ],
)
def test_another_experiment_is_refused_before_any_group(run, monkeypatch, assignment, start):
    monkeypatch.setattr(distributed, "join", no_work)
    roll_back(run, 4)
    before = sorted(run.folder.rglob("*"))
    status, printed, error = run(assignment)
    assert (status, printed) == (2, "") and error.startswith(f"megatron-lpr train: error: {start}")
    assert error.count("\n") == 1 and sorted(run.folder.rglob("*")) == before


def test_the_checkpoint_of_model_load_may_lie_elsewhere_but_not_be_gone(run, done, monkeypatch):
    """And the tokens of stage 1 are remembered for the replay budget."""
    roll_back(run, 4)
    tokens = read_run_state(run.checkpoints / "step_00000004").source["tokens"]
    before = sorted(run.folder.rglob("*"))
    (done / "stage1").rename(done / "moved")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "join", no_work)
            status, _, error = run()
        assert status == 2 and error.count("\n") == 1
        assert "step_00000004: holds routers only, and the checkpoint that its run started from is not there" in error
        assert f"(it was {done}/stage1/checkpoints/step_00000006, seen from " in error
        assert sorted(run.folder.rglob("*")) == before
        status, printed, _ = run(f"model.load={done}/moved")
    finally:
        (done / "moved").rename(done / "stage1")
    assert status == 0 and "resumes at step 4" in printed and f"of stage 1's {tokens:,}" in printed


def test_the_last_checkpoint_needs_no_other(run, done):
    (done / "stage1").rename(done / "gone")
    try:
        status, printed, _ = run("train.steps=8", "checkpoint.every=1")
    finally:
        (done / "gone").rename(done / "stage1")
    assert status == 0 and "resumes at step 6" in printed
    assert [read_run_state(run.checkpoints / f"step_{n:08d}").content for n in (7, 8)] == ["over base"] * 2


def test_run_json_of_a_newer_version(run, monkeypatch):
    monkeypatch.setattr(distributed, "join", no_work)
    file = run.checkpoints / "step_00000006/run.json"
    file.write_text(sealed(json.loads(file.read_text()) | {"version": 99}))
    status, _, error = run("train.steps=8")
    assert status == 2 and "written by a newer megatron-lpr (format 99" in error


def test_a_checkpoint_of_a_newer_megatron(run, monkeypatch):
    folder = run.checkpoints / "step_00000006"
    if not (folder / "common.pt").exists():
        pytest.skip("this Megatron-Core reads both forms")
    monkeypatch.setattr(distributed, "join", no_work)
    state = read_run_state(folder)
    for name in ("common.pt", "manifest.json", "run.json"):
        (folder / name).unlink()
    seal(folder, state)
    status, _, error = run("train.steps=8")
    assert status == 2 and f"{folder}: was written by a newer megatron-core than this one" in error


def test_two_runs_at_once_in_one_folder(project, trained, tmp_path):
    """One is refused with the other's process, and neither a line nor a checkpoint is lost."""
    settings = changed(f"output={tmp_path}/run", "train.steps=12", "checkpoint.every=3", "checkpoint.keep=0")
    words = [str(project.recipes["stage1"]), *settings]
    held = [sys.executable, Path(__file__).parents[1] / "helpers/train_held.py", "6", tmp_path / "go"]
    first = subprocess.Popen([*held, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lock = tmp_path / "run/run.lock"
    while not lock.exists() or not lock.read_text().endswith("}"):  # it says who holds it
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
    command = [sys.executable, "-m", "megatron_lpr.cli", "train", *words]
    second = subprocess.run(command, capture_output=True, text=True)
    (tmp_path / "go").touch()
    first.communicate()
    assert (first.returncode, second.returncode) == (0, 2)
    assert f"is in use by another run (host {os.uname().nodename}, pid {first.pid}" in second.stderr
    assert second.stderr.count("megatron-lpr train: error") == 1 and "Traceback" not in second.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, 13))
    assert steps(tmp_path / "run/checkpoints") == [3, 6, 9, 12] and not (tmp_path / "run/run.lock").exists()


def torchrun(recipe, *assignments):
    """`train` on two ranks."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "megatron_lpr.cli", "train", str(recipe), *changed(*assignments)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_one_rank_of_several_tells_a_refusal(project, trained, tmp_path):
    """A mistake that every rank sees, and one that rank 0 alone meets: the lock."""
    from megatron_lpr.files.locks import run_lock

    recipe, output = project.recipes["stage1"], f"output={tmp_path}/run"
    result = torchrun(recipe, output, "train.step=3")
    assert result.stderr.count("unknown key 'step'; did you mean 'steps'?") == 1 and result.returncode
    with run_lock(f"{tmp_path}/run"):
        result = torchrun(recipe, output, "train.global_batch_size=8")
    assert result.stderr.count("is in use by another run") == 1 and result.returncode


def test_two_ranks_pass_over_two_damaged_checkpoints(run, done, project):
    for step in (4, 6):
        flip(run.checkpoints / f"step_{step:08d}/__0_0.distcp")
    result = torchrun(project.recipes["stage2"], f"output={run.folder}", f"model.load={done}/stage1")
    assert result.returncode == 0 and "resumes at step 2" in result.stdout, result.stderr
