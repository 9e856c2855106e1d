"""A checkpoint that is written while training goes on is that of the moment at which it was begun."""

import dataclasses
import errno
import threading

import pytest
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.checkpoint.run_state import find_checkpoint
from megatron_lpr.checkpoint.verification import refuse_damaged
from megatron_lpr.errors import UserError
from megatron_lpr.files.checksum import ChecksummedFile
from megatron_lpr.recipe.settings import CheckpointConfig
from megatron_lpr.training.hooks.hook import Hook


@pytest.fixture
def make_trainer(megatron, toy_base, tmp_path):
    def make(name="run", steps=10, **settings):
        from megatron.core import parallel_state

        from megatron_lpr.training.train import Trainer

        parallel_state.destroy_model_parallel()
        recipe = make_recipe(toy_base, mixed_batch(), tmp_path / name, {"train": {"trainable": "all", "steps": steps}})
        recipe = dataclasses.replace(recipe, checkpoint=CheckpointConfig(**settings))
        trainer = Trainer(make_plan(recipe, mixed_batch()))
        for chunk in trainer.chunks:
            chunk.train()
        return trainer

    return make


@pytest.fixture
def slow_disk(monkeypatch):
    """Nothing is written before it is set."""
    ready, write = threading.Event(), ChecksummedFile.write

    def wait(file, data):
        assert ready.wait(60)
        return write(file, data)

    monkeypatch.setattr(ChecksummedFile, "write", wait)
    yield ready
    ready.set()


@pytest.fixture
def full_disk(monkeypatch):
    """Full as soon as it is set."""
    full, write = threading.Event(), ChecksummedFile.write

    def refuse(file, data):
        if full.is_set():
            file.error = OSError(errno.ENOSPC, "No space left on device")
            raise RuntimeError("PytorchStreamWriter failed writing file")  # what torch makes of it
        return write(file, data)

    monkeypatch.setattr(ChecksummedFile, "write", refuse)
    return full


def values(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("run.json", "manifest.json")}


def test_it_holds_the_moment_at_which_it_was_begun(make_trainer, slow_disk):
    trainer = make_trainer("asynchronous")
    trainer.train_step()
    folder = trainer.save(wait=False)
    assert not folder.exists() and trainer.saved_step is None and trainer.writer.step == 1
    trainer.train_step()  # other weights, other moments
    assert not trainer.writer.has_ended
    slow_disk.set()
    assert trainer.finish_save() == folder and trainer.saved_step == 1 and trainer.writer.step is None
    refuse_damaged(folder, contents=True)
    trainer = make_trainer("synchronous")
    trainer.train_step()
    assert values(trainer.save()) == values(folder)


def test_a_share_is_noted_when_both_of_its_files_are_written(make_trainer, monkeypatch, tmp_path):
    """What lies beside its files completes a save after a crash, which must not believe half of them."""
    from megatron_lpr.checkpoint.share import ShareWriter

    held, write = threading.Event(), ShareWriter._write

    def wait(writer, name, items):
        assert not name.endswith("_1.distcp") or held.wait(60)
        write(writer, name, items)

    monkeypatch.setattr(ShareWriter, "_write", wait)
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(wait=False)
    first, second = trainer.writer._share._threads
    first.join(60)
    assert second.is_alive() and not [*tmp_path.rglob(".shares/*")]
    held.set()
    second.join(60)
    assert [path.name for path in tmp_path.rglob(".shares/*")] == ["0"]
    trainer.finish_save()


def test_buffers_are_used_again_and_hold_the_next_moment(make_trainer):
    trainer = make_trainer("asynchronous")
    for _ in range(2):
        trainer.train_step()
        folder = trainer.save(wait=False)
        taken = {id(buffer) for buffer in trainer.writer._buffers._buffers.values()}
        trainer.finish_save()
    trainer.train_step()
    trainer.save(wait=False)
    assert taken and {id(buffer) for buffer in trainer.writer._buffers._buffers.values()} == taken
    trainer.finish_save()
    trainer = make_trainer("synchronous")
    trainer.train_step(), trainer.train_step()
    assert values(trainer.save()) == values(folder)


def test_one_at_a_time(make_trainer, slow_disk, monkeypatch, capsys):
    trainer = make_trainer()
    trainer.train_step()
    first = trainer.save(wait=False)
    trainer.train_step()
    finish_save = trainer.finish_save
    monkeypatch.setattr(trainer, "finish_save", lambda: (slow_disk.set(), finish_save())[1])
    second = trainer.save()
    assert "waits for the checkpoint of step 1, which is still being written" in capsys.readouterr().out
    for folder in (first, second):
        refuse_damaged(folder, contents=True)


def test_asked_for_twice_at_a_step_it_is_written_once(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train_step()
    assert trainer.save(wait=False) == trainer.save() == tmp_path / "run/checkpoints/step_00000001"
    assert not (tmp_path / "run/checkpoints/abandoned").exists()


def test_a_run_learns_that_its_checkpoint_is_written_and_waits_for_the_last(make_trainer, tmp_path, capsys):
    trainer = make_trainer(steps=3, every=1, keep=0)
    trainer.run()
    for step in (1, 2, 3):
        refuse_damaged(tmp_path / f"run/checkpoints/step_{step:08d}", contents=True)
    assert capsys.readouterr().out.count("saved ") == 3


def test_the_clock_and_permanent_ones(make_trainer, tmp_path):
    make_trainer(steps=9, keep_every=4, keep=1, asynchronous=False).run()
    make_trainer("clock", steps=5, every_minutes=1e-9, keep=0).run()

    def steps(name):
        return sorted(int(path.name[5:]) for path in (tmp_path / name / "checkpoints").glob("step_*"))

    assert steps("run") == [4, 8, 9]
    assert steps("clock") == [2, 3, 4, 5]  # what is said at step 1 is done at step 2


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_is_one_sentence_and_costs_no_checkpoint(make_trainer, full_disk, tmp_path, wait):
    trainer = make_trainer(steps=9, every=2, asynchronous=not wait)
    fills = Hook()
    fills.after_save = lambda *_: full_disk.set()
    trainer.hooks.append(fills)
    with pytest.raises(UserError, match="cannot be written: No space left on device.*make room") as error:
        trainer.run()
    assert "\n" not in str(error.value)
    assert find_checkpoint(str(tmp_path / "run")).folder.name == "step_00000002" and trainer.saved_step == 2
    assert not list((tmp_path / "run/checkpoints").glob(".writing*"))
