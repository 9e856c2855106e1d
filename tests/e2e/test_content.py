"""A checkpoint holds what the base does not, and what it leaves out is found again: the same bytes as a whole one's."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lpr import cli
from megatron_lpr.checkpoint import base_files
from megatron_lpr.checkpoint.dist_checkpoint import DistCheckpoint
from megatron_lpr.checkpoint.run_state import read_run_state

ROUTERS, EXPERTS = ".mlp.router.", ".mlp.experts."


def changed(**assignments):
    settings = [f"{key.replace('__', '.')}={value}" for key, value in assignments.items()]
    return [argument for assignment in settings for argument in ("--set", assignment)]


def step(run, number):
    return run / f"checkpoints/step_{number:08d}"


@pytest.fixture(scope="module")
def runs(project, trained, tmp_path_factory):
    """Both stages, `learnt` by default and `whole` with checkpoint.whole, with all checkpoints of stage 2."""
    root = tmp_path_factory.mktemp("runs")
    for name, whole in (("learnt", False), ("whole", True)):
        stage1, stage2 = root / name / "stage1", root / name / "stage2"
        project.run("train", "stage1", *changed(output=stage1, checkpoint__whole=whole))
        often = {"checkpoint__every": 2, "checkpoint__keep": 0, "checkpoint__whole": whole}
        project.run("train", "stage2", *changed(output=stage2, model__load=stage1, **often))
    return root


@pytest.fixture
def copy(runs, tmp_path):
    """Of all runs, to be damaged; stage 2 has started from the originals."""
    shutil.copytree(runs, tmp_path / "copy")
    return tmp_path / "copy"


def exported(project, checkpoint, out, *arguments):
    project.run("export", checkpoint, out, *arguments)
    return load_file(out / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(t.view(torch.uint8), other[n].view(torch.uint8)) for n, t in one.items()
    )


def test_what_each_checkpoint_holds(runs):
    held = {}
    for run, number in (("stage1", 6), ("stage2", 2), ("stage2", 4), ("stage2", 6)):
        folder = step(runs / "learnt" / run, number)
        held[run, number] = read_run_state(folder).content
        names = list(DistCheckpoint(folder))
        wanted = (ROUTERS,) if held[run, number] == "over checkpoint" else (ROUTERS, EXPERTS)
        assert all(any(part in name for part in wanted) for name in names)
        assert len(names) == 2 * (1 if wanted == (ROUTERS,) else 1 + 2 * 2)  # layers x routers, experts x matrices
        assert len(DistCheckpoint(step(runs / "whole" / run, number))) > len(names)
        assert read_run_state(step(runs / "whole" / run, number)).content == "whole"
    assert held == {
        ("stage1", 6): "over base",
        ("stage2", 2): "over checkpoint",
        ("stage2", 4): "over checkpoint",
        ("stage2", 6): "over base",
    }


@pytest.mark.parametrize("run, number", [("stage1", 6), ("stage2", 4), ("stage2", 6)])
def test_exports_and_logits_are_those_of_whole_checkpoints(project, runs, tmp_path, run, number):
    tensors = [exported(project, step(runs / name / run, number), tmp_path / name) for name in ("learnt", "whole")]
    assert same(*tensors)
    printed = project.run("verify", tmp_path / "learnt", "--checkpoint", step(runs / "learnt" / run, number))
    assert "every tensor equals its own" in printed


def test_upcycling_writes_what_the_base_does_not_hold(project):
    folder = step(project.root / "upcycle", 0)
    assert read_run_state(folder).content == "over base"
    assert all(ROUTERS in name or EXPERTS in name for name in DistCheckpoint(folder))


def test_a_run_goes_on_from_a_whole_checkpoint_with_those_of_what_it_learns(project, runs, copy, tmp_path):
    stage2 = copy / "whole/stage2"
    (stage2 / "checkpoints/latest").write_text("step_00000004")
    often = {"checkpoint__every": 1, "checkpoint__keep": 0}
    printed = project.run("train", "stage2", *changed(output=stage2, model__load=runs / "whole/stage1", **often))
    assert "resumes at step 4" in printed
    assert [read_run_state(step(stage2, n)).content for n in (5, 6)] == ["over checkpoint", "over base"]
    whole = exported(project, step(runs / "whole/stage2", 6), tmp_path / "whole")
    assert same(exported(project, stage2, tmp_path / "learnt"), whole)


def test_what_was_trained_with_everything_is_not_taken_from_the_base(project, runs, tmp_path):
    project.run("train", "moe_full", *changed(output=tmp_path / "all", train__steps=2))
    assert read_run_state(step(tmp_path / "all", 2)).content == "whole"
    often = {"checkpoint__every": 1, "checkpoint__keep": 0, "train__steps": 2}
    for name, whole in (("learnt", False), ("whole", True)):
        settings = changed(output=tmp_path / name, model__load=tmp_path / "all", checkpoint__whole=whole, **often)
        project.run("train", "stage2", *settings)
    assert [read_run_state(step(tmp_path / "learnt", n)).content for n in (1, 2)] == ["over checkpoint", "whole"]
    for number in (1, 2):
        names = ("learnt", "whole")
        assert same(*(exported(project, step(tmp_path / n, number), tmp_path / f"{n}{number}") for n in names))


def other_bytes(base, place):
    """A base that the sample does not tell from this one: one bit of a row that is not looked at is another."""
    shutil.copytree(base, place)
    tensors = load_file(place / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name].view(torch.int16)[0, 0] ^= 1
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def test_a_base_with_other_bytes_is_refused_everywhere(project, runs, copy, tmp_path, capsys):
    base = other_bytes(project.root / "base", tmp_path / "other")
    stage2 = copy / "learnt/stage2"
    (stage2 / "checkpoints/latest").write_text("step_00000004")
    stage2_over = ["train", project.recipes["stage2"], *changed(model__base=base)]
    commands = [
        ["export", step(stage2, 6), tmp_path / "out", "--base", base],
        ["export", step(stage2, 4), tmp_path / "out", "--base", base],
        ["evaluate", step(stage2, 6), "--name", "x", "--out", tmp_path / "out", "--base", base],
        [*stage2_over, *changed(output=stage2, model__load=runs / "learnt/stage1")],
        [*stage2_over, *changed(output=tmp_path / "new", model__load=runs / "learnt/stage1")],
    ]
    for command in commands:
        assert cli.main(list(map(str, command))) == 2, command
        error = capsys.readouterr().err
        assert f"model.base: {base} is not the base that the checkpoint " in error, command
        assert "(model.safetensors has the SHA-256 " in error and error.count("\n") <= 2, error
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (stage2 / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000004"]


def test_damage_in_the_checkpoint_below_is_found(project, runs, copy, tmp_path, capsys):
    stage1, stage2 = copy / "learnt/stage1", copy / "learnt/stage2"
    (runs / "learnt/stage1").rename(runs / "learnt/away")
    try:
        data = step(stage1, 6) / "__0_0.distcp"
        octets = bytearray(data.read_bytes())
        octets[-100] ^= 1
        data.write_bytes(octets)
        (stage2 / "checkpoints/latest").write_text("step_00000004")
        commands = [
            ["export", step(stage2, 4), tmp_path / "out", "--set", f"model.load={stage1}"],
            ["evaluate", step(stage2, 4), "--name", "x", "--out", tmp_path / "x", "--set", f"model.load={stage1}"],
            ["train", project.recipes["stage2"], *changed(output=stage2, model__load=stage1)],
        ]
        for command in commands:
            assert cli.main(list(map(str, command))) == 2
            assert f"checkpoint {step(stage1, 6)}: __0_0.distcp " in capsys.readouterr().err
    finally:
        (runs / "learnt/away").rename(runs / "learnt/stage1")


def test_the_same_bytes_may_lie_elsewhere(project, runs, tmp_path):
    base = shutil.copytree(project.root / "base", tmp_path / "moved")
    tensors = exported(project, step(runs / "learnt/stage2", 6), tmp_path / "out", "--base", base)
    assert same(tensors, exported(project, step(runs / "learnt/stage2", 6), tmp_path / "there"))


def test_the_base_is_read_once(project, runs, copy, monkeypatch):
    read = []
    monkeypatch.setattr(base_files, "file_sha256", lambda path: read.append(path.name) or "0" * 64)
    stage2 = copy / "learnt/stage2"
    (stage2 / "checkpoints/latest").write_text("step_00000004")
    settings = changed(output=stage2, model__load=runs / "learnt/stage1")
    assert "resumes at step 4" in project.run("train", "stage2", *settings)
    assert not read
    assert str(project.root / "base/model.safetensors") in json.loads((stage2 / base_files.MEMORY).read_text())


def test_a_run_whose_source_has_been_dropped_saves_what_it_needs(project, runs, tmp_path, monkeypatch):
    """Stage 1 has gone on and dropped the checkpoint that stage 2 started from."""
    from megatron_lpr.training.train import Trainer

    stage1 = shutil.copytree(runs / "learnt/stage1", tmp_path / "stage1")
    train_step = Trainer.train_step

    def dropped(trainer):
        if trainer.step == 3:
            shutil.rmtree(step(stage1, 6))
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", dropped)
    settings = changed(output=tmp_path / "run", model__load=stage1, checkpoint__every=2, checkpoint__keep=0)
    project.run("train", "stage2", *settings)
    contents = [read_run_state(step(tmp_path / "run", number)).content for number in (2, 4, 6)]
    assert contents == ["over checkpoint", "over base", "over base"]
    expected = exported(project, step(runs / "learnt/stage2", 4), tmp_path / "expected")
    assert same(exported(project, step(tmp_path / "run", 4), tmp_path / "out"), expected)
