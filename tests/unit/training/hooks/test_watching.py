"""How long the watchdog is told that steps, and what is none, may take."""

from types import SimpleNamespace

import pytest

from megatron_lpr.recipe.cluster import ClusterConfig
from megatron_lpr.training.hooks import watching
from megatron_lpr.training.hooks.watching import Watching


@pytest.fixture
def told(monkeypatch):
    calls = []
    dog = SimpleNamespace(expect=lambda *call: calls.append(call))
    monkeypatch.setattr(watching, "watchdog", lambda: dog)
    return calls


def trainer(step, **settings):
    limits = {"startup_minutes": 2, "watchdog": 10, "watchdog_floor_seconds": 5} | settings
    return SimpleNamespace(step=step, recipe=SimpleNamespace(cluster=ClusterConfig(**limits)))


def after_steps(*seconds, **settings):
    hook = Watching()
    for number, its in enumerate(seconds):
        hook.after_step(trainer(number + 1, **settings), {"seconds": its})
    hook.before_step(trainer(len(seconds), **settings))


@pytest.mark.parametrize(
    "seconds, settings, limit",
    [
        ((), {}, 120),  # too few to know
        ((1, 1), {}, 120),
        ((1, 100, 2), {}, 20),  # the median is 2
        ((0.1, 0.1, 0.1), {}, 5),
        ((1, 1, 1), {"watchdog": 0}, 0),
        ((100,) + (1,) * 50, {}, 10),  # of the last ones
    ],
)
def test_a_step(told, seconds, settings, limit):
    after_steps(*seconds, **settings)
    step = len(seconds) + 1
    assert told[-1] == (f"step {step}", pytest.approx(limit), f"step_{step:08d}")


def test_what_is_no_step_has_the_time_of_the_start_up(told):
    after_steps(1, 1, 1)
    hook = Watching()
    hook.before_save(trainer(3))
    assert told[-1] == ("the save after step 3", 120, "step_00000003")
    hook.finish(trainer(3, startup_minutes=0))
    assert told[-1] == ("the end of the run", 0, "step_00000003")


@pytest.mark.parametrize("step, read", [(0, 1), (3, 4), (4, 4)])
def test_the_batch_is_that_of_the_step_that_goes_on(monkeypatch, tmp_path, step, read):
    monkeypatch.setattr(watching, "step_documents", lambda recipe, step: f"of step {step}")
    its = trainer(step)
    its.plan = SimpleNamespace(train=SimpleNamespace(steps=4))
    watching._write_batch(its, tmp_path / "hang")
    assert (tmp_path / "hang/batch.txt").read_text() == f"of step {read}\n"
