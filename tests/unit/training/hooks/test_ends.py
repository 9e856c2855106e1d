"""How a run ended, as it tells itself."""

from types import SimpleNamespace

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import complete_lines, from_json
from megatron_lpr.training.hooks.ends import Ends


@pytest.fixture
def told(tmp_path, monkeypatch):
    """told(call, rank): what is written when `call` gets the hook and its trainer on a rank, without the time."""
    times = ("2026-11-25T13:00:00.000Z", "2026-11-25T12:00:00.000Z")
    (tmp_path / "starts.jsonl").write_text("".join(f'{{"time": "{time}", "step": 0}}\n' for time in times))
    trainer = SimpleNamespace(recipe=SimpleNamespace(output=str(tmp_path)), step=3)

    def tell(call, rank=0):
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        call(Ends(), trainer)
        path = tmp_path / "ends.jsonl"
        lines = [from_json(line) for line in complete_lines(path)] if path.exists() else []
        assert all(line["start"] == "2026-11-25T12:00:00.000Z" for line in lines)
        return [(line["rank"], line["step"], line["outcome"], line["reason"]) for line in lines]

    return tell


def test_finished_and_stopped(told):
    told(Ends.finish, rank=1)
    assert told(Ends.finish) == [(0, 3, "finished", None)]
    assert told(Ends.stop)[1:] == [(0, 3, "stopped", None)]


@pytest.mark.parametrize(
    "error, outcome, reason, of_others",
    [
        (UserError("no such\nthing"), "failed", "no such thing", False),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt", False),
        (SystemExit(0), "stopped", "SystemExit: 0", False),
        (MemoryError("out of it"), "failed", "MemoryError: out of it", True),
    ],
)
def test_failed(told, error, outcome, reason, of_others):
    def fail(hook, trainer):
        hook.fail(trainer, error)

    assert told(fail, rank=2) == ([(2, 3, outcome, reason)] if of_others else [])
    assert told(fail)[-1] == (0, 3, outcome, reason)
