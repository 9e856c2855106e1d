"""What a command prints is this project's: no warnings of torch, Megatron-Core or transformers among it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["train", "evaluate", "plan"])
def test_no_warnings_of_libraries(project, trained, tmp_path, command):
    words, progress = {
        "train": ((project.recipes["stage1"], "--set", f"output={tmp_path}/run", "--set", "train.steps=2"), ()),
        "plan": ((project.recipes["stage1"], "--gpus", "2", "--rehearse", "--set", "parallel.tensor=2"), ()),
        "evaluate": ((project.root / "stage2", "--name", "review", "--out", tmp_path / "result.json"), ("evaluate ",)),
    }[command]
    program = [sys.executable, "-m", "megatron_lpr.cli", command, *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if not line.startswith(progress)]
