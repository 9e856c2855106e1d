"""The commands that the quickstart runs are commands, with recipes and settings that there are."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from megatron_lpr import cli
from megatron_lpr.commands.command import all_commands
from megatron_lpr.commands.options import typed_recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture
def quickstart(monkeypatch):
    spec = importlib.util.spec_from_file_location("quickstart_run", ROOT / "examples/quickstart/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "generate", lambda *arguments: None)
    for name in ("get_model", "report"):
        monkeypatch.setattr(module.Quickstart, name, lambda *arguments: None)
    return module.Quickstart


@pytest.mark.parametrize("smoke", [False, True])
def test_every_step_is_a_command(quickstart, tmp_path, monkeypatch, smoke):
    ran = []

    def read(command, options):
        recipe = typed_recipe(options) if getattr(options, "recipe", None) else None
        ran.append((command.name, recipe))

    commands = [dataclasses.replace(c, run=lambda options, c=c: read(c, options)) for c in all_commands()]
    monkeypatch.setattr(cli, "all_commands", lambda: commands)
    quickstart(tmp_path, smoke).run()
    assert [name for name, _ in ran] == [
        *("preprocess", "upcycle", "evaluate", "train", "evaluate", "train", "evaluate", "export", "verify", "plot")
    ]
    trained = [recipe for name, recipe in ran if name == "train"]
    assert [recipe.output for recipe in trained] == [f"{tmp_path}/stage1", f"{tmp_path}/stage2"]
    assert [recipe.model.load for recipe in trained] == [f"{tmp_path}/upcycled", f"{tmp_path}/stage1"]
    assert all((recipe.train.steps == 2) == smoke for recipe in trained)


def test_what_is_done_is_left_out(quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", lambda words: 0)
    files = ("upcycled/checkpoints/latest", "base.json", "export/config.json")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    quickstart(tmp_path, smoke=True).run()
    printed = capsys.readouterr().out
    assert all(f"already done: {tmp_path / file}\n" in printed for file in files)


def test_a_command_that_fails_ends_it(quickstart, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda words: 2)
    with pytest.raises(SystemExit, match="megatron-lpr preprocess failed"):
        quickstart(tmp_path, smoke=True).run()
