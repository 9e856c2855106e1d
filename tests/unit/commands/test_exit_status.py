"""Ctrl-C and a closed pipe end every command in one sentence, with the exit status that shells know."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lpr import cli
from megatron_lpr.commands.command import all_commands
from megatron_lpr.commands.exit_status import status_of
from megatron_lpr.testing.toy_models import write_toy_model

ROOT = Path(__file__).resolve().parents[3]
MORE = {
    "evaluate": ["--name", "n", "--out", "o"],
    "export": ["o"],
    "plan": ["--gpus", "8"],
    "plot": ["--out", "o"],
    "route": ["--out", "o", "--prompt", "p"],
}


@pytest.mark.parametrize("command", all_commands(), ids=lambda command: command.name)
def test_ctrl_c(command, monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "all_commands", lambda: [dataclasses.replace(command, run=interrupted)])
    assert cli.main([command.name, "x", *MORE.get(command.name, [])]) == 130
    assert capsys.readouterr() == ("", f"megatron-lpr {command.name}: interrupted\n")


def test_a_closed_pipe():
    """As of `megatron-lpr inspect-data recipe.yaml | head`."""
    code = (
        "import sys\n"
        "from megatron_lpr.commands.exit_status import status_of\n"
        "sys.exit(status_of('x', lambda: [print('line ' * 100) for _ in range(1000)] and 0))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "x: stopped, for nobody reads what it prints\n"
    process.stderr.close()
    assert process.wait() == 141


def test_errors_of_programmers_keep_their_traceback():
    def fail():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        status_of("x", fail)


def test_an_import_that_swallows_the_interrupt(capsys):
    """As numpy's and sympy's do: Ctrl-C in the middle of them shows as another error, later."""

    def command():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            pass
        raise ImportError("cannot load module more than once per process")

    assert status_of("x", command) == 130
    assert capsys.readouterr().err == "x: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SLOW = """
import runpy, sys, time
from megatron_lpr.conversion.export.sources import UpcycledSource
stream = UpcycledSource.stream
def slow(self, units):
    for item in stream(self, units):
        yield item
        print("one", flush=True)
        time.sleep(60)
UpcycledSource.stream = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_conversion_that_is_interrupted_leaves_nothing(tmp_path):
    base = write_toy_model(tmp_path / "base")
    (tmp_path / "given").mkdir()
    for out in ("out", "given"):
        arguments = [
            str(ROOT / "tools/convert_hf.py"),
            "hf-to-hf",
            str(base),
            str(tmp_path / out),
            "--num-experts",
            "3",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], **pipes, text=True, cwd=ROOT)
        assert process.stdout.readline() == "one\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        assert process.returncode == 130 and error.splitlines()[-1] == "convert_hf.py hf-to-hf: interrupted"
        assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "given"]
    assert not list((tmp_path / "given").iterdir())
