"""The command line: what reaches the commands, exit statuses, help, and how errors of users look."""

import dataclasses
import errno
import os
import subprocess
import sys

import pytest

from megatron_lpr import __version__, cli
from megatron_lpr.commands.command import all_commands
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.reading import describe

COMMANDS = all_commands()
WORDS = [
    ["preprocess", "r.yaml", "--overwrite"],
    ["verify-data", "data"],
    ["inspect-data", "r.yaml", "--steps", "3"],
    ["upcycle", "r.yaml", "--hf", "out"],
    ["train", "r.yaml"],
    ["status", "run"],
    ["evaluate", "run", "--name", "n", "--out", "o.json"],
    ["compare", "a.json", "b.json"],
    ["export", "run", "out", "--base", "b"],
    ["verify", "out", "--checkpoint", "run"],
    ["plot", "run", "a.json", "--out", "o"],
]


@pytest.fixture
def instead(monkeypatch):
    """instead(run): what every command does."""

    def replace(run):
        commands = [dataclasses.replace(command, run=run) for command in COMMANDS]
        monkeypatch.setattr(cli, "all_commands", lambda: commands)

    return replace


def fails(error):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[0])
def test_options_reach_the_command(instead, words):
    seen = []
    instead(seen.append)
    assert cli.main(words) == 0
    [options] = seen
    given = [item for value in vars(options).values() for item in (value if isinstance(value, list) else [value])]
    assert [word for word in words[1:] if not word.startswith("--") and word not in map(str, given)] == []
    assert options.command_line == " ".join(["megatron-lpr", *words])


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[0])
def test_user_errors_are_one_line_and_status_2(instead, capsys, words):
    instead(fails(UserError("no such thing")))
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", f"megatron-lpr {words[0]}: error: no such thing\n")


def test_errors_of_programmers_keep_their_traceback(instead):
    instead(fails(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train", "r.yaml"])


@pytest.mark.parametrize(
    "words, told",
    [
        (["trian"], "megatron-lpr: error: no command 'trian'; did you mean 'train'?\n"),
        (["upcyle", "r.yaml"], "megatron-lpr: error: no command 'upcyle'; did you mean 'upcycle'?\n"),
        (
            ["train", "r.yaml", "--rnaks", "2"],
            "megatron-lpr train: error: no option '--rnaks'; did you mean '--ranks'?\n",
        ),
        (["train", "r.yaml", "s.yaml"], "megatron-lpr train: error: 's.yaml' is too much\n"),
        (["train", ""], "megatron-lpr train: error: RECIPE: is empty; give it a value\n"),
        (
            ["evaluate", "run", "--name", "n", "--out", "o.json", "--recipe", ""],
            "megatron-lpr evaluate: error: --recipe: is empty; give it a value, or leave it out\n",
        ),
        (
            ["export", "run", "out", "--graft-delta", "base", ""],
            "megatron-lpr export: error: --graft-delta: is empty; give it a value, or leave it out\n",
        ),
        (
            ["train", "r.yaml", "--set", "data.mixture={expanded:", "1}"],
            "megatron-lpr train: error: '1}' is too much: put a --set that has spaces in quotes\n",
        ),
    ],
)
def test_mistyped_words_name_the_nearest(capsys, words, told):
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", told)


def test_what_is_missing(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("megatron-lpr train: error: ")


def test_without_a_command_help_is_printed(capsys):
    assert cli.main([]) == 2
    printed, told = capsys.readouterr()
    assert printed == "" and cli.main(["--help"]) == 0
    assert capsys.readouterr() == (told, "")
    assert all(f"\n  {command.name} " in told for command in COMMANDS)
    places = [
        told.index(f"\n  {word} ")
        for word in ("preprocess", "train", "status", "evaluate", "route", "export", "verify", "plot", "report")
    ]
    assert places == sorted(places)


def help_of(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_shows_the_settings_that_a_command_reads(capsys, command):
    printed = help_of(command.name, capsys)
    assert ("settings of a recipe" in printed) == bool(command.reads)
    for name in command.reads:
        assert f"  {name}:" in printed or f"  {name}." in printed or f"  {name}[]." in printed, name
    if command.reads:
        assert "--dry-run" in printed and "--set KEY=VALUE" in printed


def test_help_of_one_command_is_not_that_of_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert "optimizer.lr:" in help_of("train", capsys)
    printed = help_of("export", capsys)
    assert "export.dtype:" in printed and "optimizer" not in printed and len(printed.splitlines()) < 60


def test_every_setting_is_in_some_help():
    shown = {line for command in COMMANDS for line in describe(only=command.reads)}
    assert shown == set(describe())


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_nothing_heavy_is_imported_before_it_is_needed():
    """Help and mistakes are told at once, and Ctrl-C is taken before the seconds of importing torch."""
    script = (
        "import sys; from megatron_lpr import cli; "
        "assert cli.main(['--help']) == 0 and cli.main(['exprot']) == 2; "
        "assert cli.main(['export', 'none', 'out', '--checkpoint', 'x']) == 2; "
        "print([m for m in ('torch', 'numpy', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "[]"


def test_a_right_that_is_missing_is_a_sentence(instead, tmp_path, capsys):
    """Wherever it is met; the tests may run as somebody who has every right."""

    def read(options):
        raise PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/latest")

    instead(read)
    assert cli.main(["status", str(tmp_path)]) == 2
    told = f"{tmp_path}/latest: Permission denied; give the right to read it, or to write there"
    assert capsys.readouterr().err == f"megatron-lpr status: error: {told}\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room and run it again"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xx"), "xx: File name too long; choose a shorter name"),
        (
            OSError(errno.EMFILE, "Too many open files", "a"),
            "a: Too many open files; allow more open files (ulimit -n)",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(instead, capsys, error, told):
    instead(fails(error))
    assert cli.main(["verify-data", "data"]) == 2
    assert capsys.readouterr().err == f"megatron-lpr verify-data: error: {told}\n"


def test_other_errors_of_the_system_keep_their_traceback(instead):
    instead(fails(OSError(errno.EBADF, "Bad file descriptor")))
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["verify-data", "data"])


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "names of files are ascii to Python here"),
        ({"PYTHONOPTIMIZE": "2"}, "PYTHONOPTIMIZE=2 (python -OO) drops the docstrings"),
    ],
)
def test_a_python_that_would_read_names_or_libraries_wrong(environment, told):
    command = [sys.executable, "-m", "megatron_lpr.cli", "verify-data", "data"]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and f"error: {told}" in result.stderr


def test_an_option_behind_two_dashes(capsys):
    assert cli.main(["verify", "--", "-export", "--checkpoint", "run"]) == 2
    assert "'--checkpoint' stands behind --, where all words are names" in capsys.readouterr().err


def test_a_name_that_is_not_utf8(capsys):
    assert cli.main(["verify-data", "h\udce1z"]) == 2
    assert "': is not UTF-8" in capsys.readouterr().err


def test_a_folder_that_was_removed_under_the_shell(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["verify-data", "data"]) == 2
    assert "the folder that this is started in has been removed" in capsys.readouterr().err
