"""The command line: what reaches the commands, exit statuses, and how errors of users look."""

import pytest

from megatron_lpr import __version__, cli, commands
from megatron_lpr.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("{name: x, output: o, model: {base: b}}")
    return str(path)


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the commands, which do nothing."""
    seen = []
    for name in ("preprocess", "upcycle", "train", "evaluate", "compare", "export", "verify"):
        monkeypatch.setattr(commands, name, lambda _name=name, **options: seen.append((_name, options)))
    return seen


def test_options_reach_the_command(recipe, calls):
    assert cli.main(["train", recipe, "--set", "model.topk=3", "--set", "name=y", "--dry-run"]) == 0
    [(name, options)] = calls
    assert name == "train" and options.keys() == {"recipe", "dry_run"} and options["dry_run"] is True
    assert options["recipe"].model.topk == 3 and options["recipe"].name == "y"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["preprocess", "--overwrite"], {"overwrite": True, "dry_run": False}),
        (["upcycle"], {"dry_run": False}),
        (["evaluate", "--name", "n", "--out", "o", "--hf", "h"], {"name": "n", "out": "o", "hf": "h"}),
        (["export", "--checkpoint", "c", "--out", "o"], {"checkpoint": "c", "out": "o"}),
        (["verify", "e", "--checkpoint", "c"], {"export_dir": "e", "checkpoint": "c"}),
    ],
)
def test_every_command_takes_a_recipe_first(recipe, calls, arguments, expected):
    command, *rest = arguments
    assert cli.main([command, recipe, *rest]) == 0
    [(name, options)] = calls
    assert name == command and options["recipe"].name == "x"
    assert {key: options[key] for key in expected} == expected


def test_compare_takes_results(calls):
    assert cli.main(["compare", "a.json", "b.json"]) == 0
    assert calls == [("compare", {"files": ["a.json", "b.json"]})]


def test_user_errors_are_one_line_and_status_2(recipe, monkeypatch, capsys):
    def fail(**options):
        raise UserError("no such thing")

    monkeypatch.setattr(commands, "train", fail)
    assert cli.main(["train", recipe]) == 2
    assert capsys.readouterr() == ("", "megatron-lpr train: error: no such thing\n")


def test_errors_of_programmers_keep_their_traceback(recipe, monkeypatch):
    def fail(**options):
        raise ValueError("a bug")

    monkeypatch.setattr(commands, "train", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train", recipe])


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["export", "r.yaml"], ["train", "r.yaml", "--fly"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: megatron-lpr" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"{__version__}\n"
