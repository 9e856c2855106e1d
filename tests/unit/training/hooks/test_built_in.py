"""What is called around the loop, in which order, and what the hooks that every run has do."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from harness import make_plan, make_recipe, mixed_batch

from megatron_lpr.errors import UserError
from megatron_lpr.reporting.metrics_log import read_metrics


def test_a_script_can_write_a_hook_before_it_has_megatron():
    look = "import sys, megatron_lpr.training.hooks.built_in; sys.exit('megatron.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", look], check=True)


def metrics(step, **changes):
    record = {"step": step, "steps": 2, "stage": "x", "ntp_loss": 1.0, "balance_loss": None, "lpr_loss": None}
    numbers = dict.fromkeys(("grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "consumed_samples"), 1.0)
    return record | numbers | {"ntp_loss_per_language": {}, "tokens_per_language": {"hu": 1}} | changes


@pytest.fixture
def reported(megatron, toy_base, tmp_path):
    """reported(records, resumed_step): a run's hooks that report, with those steps; call `finish` on the result."""
    from megatron_lpr.training.hooks.metrics import Metrics
    from megatron_lpr.training.hooks.plots import Plots

    recipe = make_recipe(toy_base, mixed_batch(), tmp_path / "out", {})

    class Reported:
        def __init__(self, *records, resumed_step=0):
            self.hooks, self.trainer = [Metrics(), Plots()], SimpleNamespace(recipe=recipe, step=resumed_step)
            for hook in self.hooks:
                hook.start(self.trainer)
            for record in records:
                for hook in self.hooks:
                    hook.after_step(self.trainer, record)

        def finish(self):
            for hook in self.hooks:
                hook.finish(self.trainer)

    return Reported


def test_plots_of_the_whole_run_resumed_or_not(reported, tmp_path, capsys):
    router = {"hu": {"frozen_share": [0.5, 0.25], "p0": [0.5, 0.5], "load": [[0.5, 0.5]] * 2}}
    reported(metrics(1, router=router))
    reported(metrics(2), resumed_step=1).finish()
    assert f"plots in {tmp_path / 'out/plots'}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out/plots").iterdir()} == {"losses.png", "frozen_share.png"}


def test_what_cannot_be_plotted_does_not_fail_a_run_that_is_saved(reported, tmp_path, capsys):
    run = reported(metrics(1))
    (tmp_path / "out/metrics.jsonl").write_text("nonsense\n")
    run.finish()
    printed = capsys.readouterr().out
    assert "warning: no plots: metrics" in printed and "no line of 1 is a step's record" in printed
    assert not (tmp_path / "out/plots").exists()


def test_lines_that_are_moved_are_said(reported, tmp_path, capsys):
    reported(metrics(1))
    reported()
    assert "lines of steps 1 to 1, beyond step 0 where this run goes on, are now in" in capsys.readouterr().out
    assert not read_metrics(tmp_path / "out/metrics.jsonl")


@pytest.fixture
def make_trainer(megatron, toy_base, tmp_path):
    def make(hooks=(), **sections):
        from megatron.core import parallel_state

        from megatron_lpr.training.train import Trainer

        parallel_state.destroy_model_parallel()
        sections = {
            "train": {"trainable": "routers", "steps": 3},
            "checkpoint": {"every": 2, "asynchronous": False},
        } | sections
        return Trainer(
            make_plan(make_recipe(toy_base, mixed_batch(), tmp_path / "run", sections), mixed_batch()), hooks
        )

    return make


class Diary:
    """Writes down every call."""

    def __init__(self):
        self.pages = []

    def __getattr__(self, name):
        return lambda trainer, *details: self.pages.append((name, trainer.step, *details))


def test_a_hook_of_your_own_is_called_after_what_every_run_does(make_trainer, tmp_path):
    diary = Diary()
    make_trainer([diary]).run()
    root = tmp_path / "run/checkpoints"
    assert [page[:2] for page in diary.pages] == [
        ("start", 0),
        ("before_step", 0),
        ("after_step", 1),
        ("before_step", 1),
        ("before_save", 2),
        ("after_save", 2),
        ("after_step", 2),
        ("before_step", 2),
        ("before_save", 3),
        ("after_save", 3),
        ("after_step", 3),
        ("finish", 3),
    ]
    assert [page[2] for page in diary.pages if page[0] == "after_save"] == [root / f"step_0000000{n}" for n in (2, 3)]
    logged = [record["ntp_loss"] for record in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert [page[2]["ntp_loss"] for page in diary.pages if page[0] == "after_step"] == logged


def test_a_run_that_fails_tells_its_hooks_and_keeps_its_own_error(make_trainer, monkeypatch, capsys):
    from megatron_lpr.training.hooks.hook import Hook
    from megatron_lpr.training.hooks.metrics import Metrics

    class Failing(Hook):
        def after_step(self, trainer, metrics):
            raise UserError("enough")

        def fail(self, trainer, error):
            raise RuntimeError(f"and this beside '{error}'")

    closed = []
    monkeypatch.setattr(Metrics, "end", lambda self, trainer: closed.append(trainer.step))
    diary = Diary()
    with pytest.raises(UserError, match="enough"):
        make_trainer([Failing(), diary]).run()
    assert [page[0] for page in diary.pages] == ["start", "before_step", "fail"] and closed == [1]
    assert "warning: Failing: and this beside 'enough'" in capsys.readouterr().out


def test_what_a_hook_raises_before_a_save_leaves_it_unwritten(make_trainer, tmp_path):
    from megatron_lpr.training.hooks.hook import Hook

    class Never(Hook):
        def before_save(self, trainer):
            raise UserError("not now")

    with pytest.raises(UserError, match="not now"):
        make_trainer([Never()]).run()
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("final_optimizer", [True, False])
def test_the_last_checkpoint_has_the_optimizer_if_it_is_to_have_it(make_trainer, tmp_path, final_optimizer):
    from megatron_lpr.checkpoint.run_state import read_run_state

    make_trainer(checkpoint={"every": 2, "final_optimizer": final_optimizer}).run()
    root = tmp_path / "run/checkpoints"
    has = [read_run_state(root / f"step_0000000{step}").has_optimizer for step in (2, 3)]
    assert has == [True, final_optimizer]
