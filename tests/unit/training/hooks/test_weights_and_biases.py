"""The hook against a stand-in for the package: one run for all starts, and no failure of it that ends the training."""

import sys
import threading
from types import SimpleNamespace

import pytest

from megatron_lpr.recipe.reading import from_tree, to_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.hooks import weights_and_biases
from megatron_lpr.training.hooks.weights_and_biases import WeightsAndBiases

METRICS = {"step": 3, "ntp_loss": 1.5, "balance_loss": None, "lpr_loss": None, "grad_norm": 1.0, "lr": 0.1}
METRICS |= {"tokens": 8, "tokens_per_second": 4.0, "seconds": 2.0, "consumed_samples": 9, "tokens_per_language": {}}
METRICS["ntp_loss_per_language"] = {}


class FakeWandb(SimpleNamespace):
    """Writes down what it is asked for; `broken` names a call that fails."""

    def __init__(self):
        super().__init__(calls=[], broken=None)
        self.Settings = lambda **settings: settings

    def init(self, **options):
        return self._call("init", options) or SimpleNamespace(
            log=lambda data: self._call("log", data),
            define_metric=lambda name, step_metric: self._call("define_metric", (name, step_metric)),
            finish=lambda exit_code: self._call("finish", exit_code),
        )

    def _call(self, name, value):
        if name == self.broken:
            raise ConnectionError("no\nnetwork")
        self.calls.append((name, value))


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def trainer(tmp_path):
    tree = {"name": "stage 1: new/old", "output": str(tmp_path / "run"), "model": {"base": "b"}}
    return SimpleNamespace(recipe=from_tree(Recipe, tree | {"logging": {"wandb": "online"}}, where="test"))


def start_and_log(trainer):
    hook = WeightsAndBiases()
    hook.start(trainer)
    hook.after_step(trainer, METRICS)
    return hook


def test_all_starts_are_one_run(wandb, trainer, tmp_path):
    start_and_log(trainer).stop(trainer)
    start_and_log(trainer).fail(trainer, RuntimeError())
    names = [name for name, _ in wandb.calls]
    assert names == ["init", "define_metric", "log", "finish"] * 2
    first, second = (options for name, options in wandb.calls if name == "init")
    assert first == second and first["id"] == (tmp_path / "run/wandb_run_id").read_text()
    assert (first["project"], first["name"], first["mode"]) == ("stage 1- new-old", "run", "online")
    assert first["resume"] == "allow" and first["dir"] == str(tmp_path / "run")
    assert first["config"] == to_tree(trainer.recipe)
    logged = next(data for name, data in wandb.calls if name == "log")
    assert logged["step"] == 3 and logged["loss/ntp"] == 1.5 and logged["throughput/tokens_per_second"] == 4.0
    assert [status for name, status in wandb.calls if name == "finish"] == [0, 1]


@pytest.mark.parametrize("broken, made", [("init", []), ("log", ["init", "define_metric"])])
def test_what_fails_is_a_warning_once(wandb, trainer, capsys, broken, made):
    wandb.broken = broken
    hook = start_and_log(trainer)
    hook.after_step(trainer, METRICS)
    hook.finish(trainer)
    assert [name for name, _ in wandb.calls] == made
    assert capsys.readouterr().err == ("warning: logging.wandb: no network; the run goes on without Weights & Biases\n")


def test_the_end_does_not_wait_for_a_network(wandb, trainer, monkeypatch, capsys):
    monkeypatch.setattr(weights_and_biases, "_END_SECONDS", 0.01)
    network = threading.Event()
    hook = start_and_log(trainer)
    hook._run.finish = lambda exit_code: network.wait(60)
    hook.finish(trainer)
    network.set()
    assert "not all is uploaded after 0.01 seconds" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_left_out(wandb, trainer):
    hook = WeightsAndBiases()
    hook.start(trainer)
    hook.after_step(trainer, METRICS | {"ntp_loss": float("nan")})
    assert "loss/ntp" not in wandb.calls[-1][1]
