"""Several ranks write a checkpoint: what one cannot write none has, and each learns of it. Reading is shared too."""

import dataclasses
import errno
from pathlib import Path

from harness import make_plan, make_recipe, mixed_batch

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
