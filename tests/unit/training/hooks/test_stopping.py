"""A run that is asked to stop: when, what it saves, what it says. Of signals: tests/unit/test_signals.py."""

import time
from types import SimpleNamespace

import pytest
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.errors import Stopped
from megatron_lpr.training.hooks.hook import Hook
from megatron_lpr.training.hooks.stopping import Stopping, _limits


class Asking(Hook):
    """Asks at one call of a step, as a signal might; writes down how the run ends."""

    def __init__(self, call, step):
        self.call, self.step, self.saves, self.end = call, step, [], None

    def _ask(self, trainer, call):
        if (call, trainer.step) == (self.call, self.step):
            trainer.votes.say("stop")

    def before_step(self, trainer):
        self._ask(trainer, "before_step")

    def after_step(self, trainer, metrics):
        self._ask(trainer, "after_step")

    def after_save(self, trainer, folder):
        self.saves.append(trainer.step)
        self._ask(trainer, "after_save")

    def stop(self, trainer):
        self.end = "stop"

    def finish(self, trainer):
        self.end = "finish"

    def fail(self, trainer, error):
        self.end = "fail"


@pytest.fixture
def run(megatron, toy_base, tmp_path):
    """run(hook, **train): whether a run of 4 steps that saves every 2 was stopped."""

    def start(hook, **train):
        from megatron.core import parallel_state

        from megatron_lpr.training.train import Trainer

        parallel_state.destroy_model_parallel()
        sections = {
            "train": {"trainable": "routers", "steps": 4} | train,
            "checkpoint": {"every": 2, "asynchronous": False},
        }
        plan = make_plan(make_recipe(toy_base, mixed_batch(), tmp_path / "run", sections), mixed_batch())
        trainer = Trainer(plan, [hook])
        try:
            trainer.run()
        except Stopped:
            return True
        return False

    return start


@pytest.mark.parametrize(
    "call, step, saves",
    [
        ("before_step", 0, [1]),
        ("after_step", 1, [2]),  # too late for the step; saved by the next one anyway
        ("before_step", 2, [2, 3]),
        ("after_save", 2, [2]),  # in a save: no further step
    ],
)
def test_saves_once_and_says_so(run, tmp_path, capsys, call, step, saves):
    hook = Asking(call, step)
    assert run(hook)
    assert (hook.saves, hook.end) == (saves, "stop")
    last = f"stopped by a hook after step {saves[-1]} of 4, which is saved; the same command goes on from there\n"
    assert capsys.readouterr().out.endswith(last)
    assert (tmp_path / "run/stopped").read_text() == last


@pytest.mark.parametrize("call, step", [("before_step", 3), ("after_step", 4), ("after_save", 4)])
def test_after_the_last_step_there_is_nothing_to_stop(run, tmp_path, call, step):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stopped").write_text("an earlier start")
    hook = Asking(call, step)
    assert not run(hook)
    assert (hook.saves, hook.end) == ([2, 4], "finish") and not (tmp_path / "run/stopped").exists()


def test_the_time_is_over(run, tmp_path, monkeypatch, capsys):
    hook = Asking(None, None)
    assert run(hook, max_minutes=1e-6)
    assert "stopped by train.max_minutes (1e-06) after step 1 of 4" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 60))
    assert run(hook)
    printed, warned = capsys.readouterr()
    assert "stopped by the time limit of the Slurm job after step 1 of 4" in printed
    assert "and the run stops 5 minutes before (cluster.margin_minutes): it makes one step" in warned
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() - 60_000))
    assert run(hook)
    assert "the time of Slurm job 1 was over 1,000 minutes ago: the run makes one step" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 3600))
    assert not run(hook)


@pytest.mark.parametrize(
    "step, seconds, validation_seconds, stops", [(0, 10, 60, False), (1, 10, 60, True), (0, 90, 0, True)]
)
def test_the_time_of_a_step_and_of_its_validation_is_left(step, seconds, validation_seconds, stops):
    said, hook = [], Stopping()
    trainer = SimpleNamespace(
        step=step,
        recipe=SimpleNamespace(evaluation=SimpleNamespace(every=2)),
        plan=SimpleNamespace(train=SimpleNamespace(steps=9)),
        votes=SimpleNamespace(say=said.append),
    )
    hook.after_step(trainer, {"seconds": seconds, "validation_seconds": validation_seconds})
    hook.after_step(trainer, {"seconds": 1})
    hook._limits = {"the time": time.monotonic() + 65}
    hook.before_step(trainer)
    assert said == ["stop"] * stops


def test_minutes_count_from_when_the_command_began(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    trainer = SimpleNamespace(plan=SimpleNamespace(train=SimpleNamespace(max_minutes=2.5)))
    assert _limits(trainer, since=100.0) == {"train.max_minutes (2.5)": 250.0}
