"""What a run says when it starts and when it ends."""

import pytest
from harness import make_recipe, mixed_batch

from megatron_lpr.reporting.metrics_log import each_record
from megatron_lpr.training.reporting import Reporter


def metrics(step, **changes):
    record = {"step": step, "steps": 2, "stage": "x", "ntp_loss": 1.0, "balance_loss": None, "lpr_loss": None}
    numbers = dict.fromkeys(("grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "consumed_samples"), 1.0)
    return record | numbers | {"tokens_per_language": {"hu": 1}} | changes


@pytest.fixture
def reporter(megatron, toy_base, tmp_path):
    recipe = make_recipe(toy_base, mixed_batch(), tmp_path / "out", {})
    return lambda resumed_step=0: Reporter(recipe, resumed_step)


def test_plots_of_the_whole_run_resumed_or_not(reporter, tmp_path, capsys):
    router = {"hu": {"frozen_share": [0.5, 0.25], "p0": [0.5, 0.5], "load": [[0.5, 0.5]] * 2}}
    reporter().step(metrics(1, router=router))
    resumed = reporter(1)
    resumed.step(metrics(2))
    resumed.finish()
    assert f"plots in {tmp_path / 'out/plots'}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out/plots").iterdir()} == {"losses.png", "frozen_share.png"}


def test_what_cannot_be_plotted_does_not_fail_a_run_that_is_saved(reporter, tmp_path, capsys):
    reporter().step(metrics(1))
    with (tmp_path / "out/metrics.jsonl").open("a") as out:
        out.write("nonsense\n")
    resumed = reporter(0)
    resumed.step(metrics(1))
    with (tmp_path / "out/metrics.jsonl").open("a") as out:
        out.write("nonsense\n")
    resumed.finish()
    printed = capsys.readouterr().out
    assert "warning: no plots: metrics" in printed and "line 2: not a step's record; remove the line" in printed
    assert not (tmp_path / "out/plots").exists()


def test_lines_that_are_moved_are_said(reporter, tmp_path, capsys):
    reporter().step(metrics(1))
    reporter()
    assert "lines of steps 1 to 1, beyond step 0 where this run goes on, are now in" in capsys.readouterr().out
    assert not list(each_record(tmp_path / "out/metrics.jsonl"))
