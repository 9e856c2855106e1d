"""Settings of what a run logs: a window of steps to trace, and Weights & Biases."""

import importlib.util

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.checks import check_logging, check_wandb_here
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import LoggingConfig


def check(settings, world_size=1):
    logging = from_tree(LoggingConfig, settings, where="test")
    check_logging(logging, steps=4, world_size=world_size)
    check_wandb_here(logging)


@pytest.mark.parametrize(
    "world_size, settings, expected",
    [
        (1, {"profile_from": 3, "profile_to": 5}, "3 to 5; choose steps from 1 to train.steps .4., the first before"),
        (1, {"profile_to": 2}, "logging.profile_from, profile_to: 0 to 2"),
        (1, {"profile_from": 1, "profile_to": 1, "profile_ranks": []}, "logging.profile_ranks: empty"),
        (1, {"profile_ranks": [1]}, "logging.profile_ranks: has no effect without logging.profile_from"),
        (2, {"profile_from": 1, "profile_to": 1, "profile_ranks": [0, 2]}, "2, but the last rank of the run is 1"),
    ],
)
def test_a_window_of_steps(world_size, settings, expected):
    with pytest.raises(UserError, match=expected):
        check(settings, world_size)


def test_a_window_that_is_one():
    check({"profile_from": 1, "profile_to": 4, "profile_ranks": [1]}, 2)


def test_wandb_off_is_a_word_here_not_a_bool():
    assert from_tree(LoggingConfig, {"wandb": False}, where="test").wandb == "off"  # as YAML reads it


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_needs_its_package(monkeypatch, mode):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"logging.wandb: {mode} needs the package wandb: pip install"):
        check({"wandb": mode})


def test_wandb_online_needs_a_login(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine elsewhere login user password x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    check({"wandb": "offline"})
    with pytest.raises(UserError, match="logging.wandb: online without a login; call wandb login"):
        check({"wandb": "online"})
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere/path")
    check({"wandb": "online"})
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    check({"wandb": "online"})
