"""The commands of the README, one after the other as they stand there, on a toy project with files of their names."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_lpr import cli
from megatron_lpr.testing.toy_models import toy_recipes, write_recipe, write_toy_project

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[list[str]]:
    section = README.read_text(encoding="utf-8").split("\n## Train your own\n")[1]
    block = re.search(r"^```\n(.*?)^```", section, re.M | re.S)[1]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_toy_project(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "base").rename(tmp_path / "models/base")
    trees = toy_recipes(tmp_path)
    for name, load in (("upcycle", None), ("stage1", None), ("stage2", "runs/stage1")):
        tree = trees[name]
        tree["output"] = f"runs/{name}"
        tree["model"] = tree["model"] | {"base": "models/base", "load": load}
        tree["data"] = tree["data"] | {"manifest": "data/manifest.yaml"}
        tree["preprocess"] = tree["preprocess"] | {"output": "data"}
        if "train" in tree:
            tree["train"] = tree["train"] | {"steps": 2}
            tree["optimizer"] = {"lr": 1e-2}
        write_recipe(tmp_path / f"{'common' if name == 'upcycle' else name}.yaml", tree)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_as_they_stand(folder, capsys):
    for program, *words in commands():
        assert program == "megatron-lpr"
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
    printed = capsys.readouterr().out
    assert "stage 2 vs base" in printed and "kept" in printed
    assert {path.name for path in (folder / "runs").iterdir()} >= {"stage1", "stage2", "export", "plots", "base.json"}
