"""Which checkpoint a path means, and run.json."""

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.training.run_state import (
    RunState,
    checkpoint_folder,
    find_checkpoint,
    read_run_state,
    write_run_state,
)

STATE = RunState(
    step=7, consumed_samples=28, has_optimizer=True, recipe={"name": "é"}, tokens_per_language={"hu": 3}
)


@pytest.fixture
def run(tmp_path):
    for step in (3, 7):
        folder = tmp_path / f"run/checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        write_run_state(folder, STATE)
    (tmp_path / "run/checkpoints/latest").write_text("step_00000007\n")
    return tmp_path / "run"


def test_run_means_its_newest_checkpoint(run):
    assert checkpoint_folder(str(run)) == find_checkpoint(str(run)) == run / "checkpoints/step_00000007"


def test_checkpoint_means_itself(run):
    folder = run / "checkpoints/step_00000003"
    assert checkpoint_folder(str(folder)) == folder


def test_round_trip(run):
    assert read_run_state(checkpoint_folder(str(run))) == STATE


def test_no_checkpoint(tmp_path):
    assert find_checkpoint(str(tmp_path)) is None
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint_folder(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_folder(str(tmp_path / "none"))
