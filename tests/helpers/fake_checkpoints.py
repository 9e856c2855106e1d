"""Checkpoints that are complete by their files' names and hold nothing."""

from pathlib import Path

from megatron_lpr.checkpoint.run_state import RunState, write_run_state

RECIPE = {"name": "é", "model": {"num_experts": 3, "num_frozen_experts": 1, "topk": 2, "dtype": "float32"}}


def write_fake_checkpoint(root: Path, step: int, **state) -> Path:
    """<root>/step_<step>; `state` replaces entries of its run.json."""
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    fields = {"step": step, "consumed_samples": 4 * step, "has_optimizer": True, "recipe": RECIPE} | state
    write_run_state(folder, RunState(**fields))
    for name in ("metadata.json", ".metadata", "__0_0.distcp"):
        (folder / name).touch()
    return folder
