"""Several ranks write a checkpoint: what one cannot write none has, and each learns of it. Reading is shared too."""

import dataclasses
import errno
import time
from pathlib import Path

from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.checkpoint.completion import complete_saves
from megatron_lpr.checkpoint.run_state import find_checkpoint
from megatron_lpr.checkpoint.verification import refuse_damaged
from megatron_lpr.testing.equal_runs import checkpoint_tensors

SECTIONS = {"train": {"trainable": "all", "steps": 4, "micro_batch_size": 1}}


def save_and_fail(base: Path, root: Path) -> dict:
    """On each rank: a run whose disk is full for rank 1 after the first checkpoint."""
    from megatron_lpr.checkpoint.run_folder import run_folder
    from megatron_lpr.errors import UserError
    from megatron_lpr.files.checksum import ChecksummedFile
    from megatron_lpr.platform import Ranks, leave_layout, megatron
    from megatron_lpr.recipe.settings import CheckpointConfig
    from megatron_lpr.training.hooks.hook import Hook

    write, saved = ChecksummedFile.write, []

    def refuse(file, data):
        if saved and Ranks.from_environment().rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    class Saved(Hook):
        def after_save(self, trainer, folder):
            saved.append(trainer.saved_step)

    recipe = make_recipe(base, mixed_batch(), root / "run", SECTIONS)
    recipe = dataclasses.replace(recipe, checkpoint=CheckpointConfig(every=2))
    with run_folder(recipe.output, None), megatron():
        from megatron_lpr.training.train import Trainer

        trainer = Trainer(make_plan(recipe, mixed_batch()), [Saved()])
        ChecksummedFile.write = refuse
        try:
            trainer.run()
        except UserError as error:
            return {"saved": saved, "error": str(error)}
        finally:
            ChecksummedFile.write = write
            del trainer
            leave_layout()


def save_and_crash(base: Path, root: Path) -> None:
    """On each rank: all shares of a save are written, and nobody finishes it."""
    from megatron_lpr.platform import leave_layout, megatron

    recipe = make_recipe(base, mixed_batch(), root, SECTIONS)
    with megatron():
        from megatron_lpr.training.train import Trainer

        trainer = Trainer(make_plan(recipe, mixed_batch()))
        trainer.train_step()
        trainer.save(wait=False)
        while not trainer.writer.has_ended:
            time.sleep(0.01)
        del trainer
        leave_layout()


def test_a_save_of_several_ranks_is_completed_after_a_crash(on_ranks, toy_base, tmp_path):
    on_ranks(save_and_crash, 2, toy_base, tmp_path)
    shares = tmp_path / "checkpoints/.writing_step_00000001/.shares"
    second = (shares / "1").rename(tmp_path / "1")
    assert complete_saves(str(tmp_path)) == []
    second.rename(shares / "1")
    assert complete_saves(str(tmp_path)) == ["step_00000001"]
    folder = find_checkpoint(str(tmp_path)).folder
    refuse_damaged(folder, contents=True)
    assert any(tensor.any() for key, tensor in checkpoint_tensors(tmp_path).items() if ".exp_avg_sq." in key)


def read_shared(folder: Path) -> dict:
    """On each rank of a meeting: what it was told, and how many files it has read itself."""
    from megatron_lpr.checkpoint import verification
    from megatron_lpr.platform import Ranks, meeting, megatron

    ranks, read, look = Ranks.from_environment(), [], verification.fault_of_file

    def note(path, *arguments, **options):
        read.append(path.name)
        return look(path, *arguments, **options)

    verification.fault_of_file = note
    try:
        with meeting(ranks.rank, ranks.world_size, print):
            result = {"fault": verification.verify_files(folder), "read": sorted(read)}
            # as in a command, rank 0 does not end before the others have been told: it has the store
            with megatron():
                return result
    finally:
        verification.fault_of_file = look


def test_a_failing_rank_and_a_shared_check(on_ranks, toy_base, tmp_path):
    results = on_ranks(save_and_fail, 2, toy_base, tmp_path)
    folder = tmp_path / "run/checkpoints/step_00000002"
    assert results[0] == results[1] and results[0]["saved"] == [2]
    assert (
        "__1_0.distcp cannot be written: No space left on device (rank 1); the checkpoints before"
        in results[0]["error"]
    )
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step_00000002"]
    files = sorted(path.name for path in folder.iterdir() if path.name not in ("run.json", "manifest.json"))
    assert {"__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__1_1.distcp"} < set(files)

    good = on_ranks(read_shared, 2, folder)
    assert [result["fault"] for result in good] == ["", ""]
    assert sorted(good[0]["read"] + good[1]["read"]) == files and all(result["read"] for result in good)
    for name in ("__0_0.distcp", "__1_1.distcp"):
        (folder / name).write_bytes(b"")
    damaged = on_ranks(read_shared, 2, folder)
    assert damaged[0]["fault"] == damaged[1]["fault"]
    assert (
        damaged[0]["fault"].startswith("__0_0.distcp has 0 bytes in place of ") and "and 1 more" in damaged[0]["fault"]
    )
