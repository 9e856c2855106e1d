"""Checkpoints that are complete by their files' names and hold nothing."""

import dataclasses
from pathlib import Path

from megatron_lpr.checkpoint.manifest import write_manifest
from megatron_lpr.checkpoint.run_state import RunState, write_run_state
from megatron_lpr.files.checksum import file_checksum

MODEL = {"num_experts": 3, "num_frozen_experts": 1, "topk": 2, "dtype": "float32", "mlp_only_layers": [], "load": None}
RECIPE = {  # no more than is read of it
    "name": "é",
    "model": MODEL,
    "train": None,
    "balance": {"coeff": 0.0},
    "lpr": {"coeff": 0.0},
    "preprocess": {"bos": "auto"},
}
BASE = {"architecture": {}, "weights": None, "tokenizer": None}  # none that is another than any other


def write_fake_checkpoint(root: Path, step: int, **state) -> Path:
    """<root>/step_<step>; `state` replaces entries of its run.json."""
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    fields = {"step": step, "consumed_samples": 4 * step, "has_optimizer": True, "recipe": RECIPE, "base": BASE} | state
    for name in ("metadata.json", ".metadata", "__0_0.distcp"):
        (folder / name).touch()
    seal(folder, RunState(**fields))
    return folder


def seal(folder: Path, state: RunState) -> None:
    """Make a complete checkpoint of a folder with files: its manifest and run.json."""
    checksums = {file.name: file_checksum(file) for file in folder.iterdir()}
    write_run_state(folder, dataclasses.replace(state, manifest=write_manifest(folder, checksums)))
