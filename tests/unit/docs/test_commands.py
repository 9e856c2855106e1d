"""Every command that README, CONTRIBUTING and docs/ name is one: its program, options, files and recipes exist.

In blocks of code and in `code` inside a text. Placeholders are capitals, what may be left out stands in brackets, and
export|verify is both. tests/e2e/test_readme.py runs the README's; CI runs `make quickstart` and `make test` themselves.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest

from megatron_lpr.commands.command import all_commands
from megatron_lpr.recipe.reading import load_recipe

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("megatron-lpr", "make", "python", "python3", "torchrun", "sbatch", "pip", "convert_hf.py")
# modules of others: they are not looked into
MODULES = {
    "nltk.downloader": "downloads data",
    "pytest": "is what runs this",
    "mypy": "is a step of CI",
    "vllm.entrypoints.openai.api_server": "serves exports",
}


def blocks(text: str, *languages: str) -> list[str]:
    return [code for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def commands_of(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    lines = [line for code in blocks(text, "", "bash") for line in code.replace("\\\n", " ").splitlines()]
    around = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += re.findall(r"(?<!`)`([^`]+)`(?!`)", around)
    found = (" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines)
    commands = [line for line in found if line.split(" ")[0] in PROGRAMS and " " in line]
    return list(dict.fromkeys(spelled for command in commands for spelled in spellings(command)))


def spellings(command: str) -> list[str]:
    """Without brackets, with the first of [--a A | --b B]; one for each of the alternatives a|b."""
    command = re.sub(r"\[([^\[\]|]+) \| [^\[\]]+\]", r"\1", command)
    command = re.sub(r"\[(?!\w+\]['\"])|(?<!\w)\]|(?<=[A-Z\w])\](?!['\"])", "", command)
    choice = re.search(r"\b[\w-]+(?:\|[\w-]+)+\b", command)
    if not choice:
        return [command]
    return [s for one in choice[0].split("|") for s in spellings(command.replace(choice[0], one, 1))]


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize("page, command", COMMANDS, ids=[f"{page.stem}: {command}" for page, command in COMMANDS])
def test_command(page, command):
    program, *words = shlex.split(command)
    {
        "megatron-lpr": check_megatron_lpr,
        "make": check_make,
        "python": check_python,
        "python3": check_python,
        "torchrun": check_torchrun,
        "sbatch": check_sbatch,
        "pip": check_pip,
        "convert_hf.py": lambda words: check_python(["tools/convert_hf.py", *words]),
    }[program](words)


def test_there_are_commands():
    named = {shlex.split(command)[1] for _, command in COMMANDS if command.startswith("megatron-lpr ")}
    assert {command.name for command in all_commands()} <= named, "a command that no page names"
    assert len(COMMANDS) > 30


def check_megatron_lpr(words: list[str]) -> None:
    """Parsed by the command's own parser; settings and recipes of examples/ exist."""
    name, *arguments = words
    if words in (["--help"], ["COMMAND", "--help"]):
        return
    commands = {command.name: command for command in all_commands()}
    assert name in commands, f"no command {name}"
    parser = argparse.ArgumentParser(exit_on_error=False)
    commands[name].add_arguments(parser)
    try:
        # a number where a number is wanted
        options, unknown = parser.parse_known_args(["1" if word == "N" else word for word in arguments])
    except (SystemExit, argparse.ArgumentError) as error:
        # a command named without its arguments: Python 3.11 and 3.12 end without exit_on_error too
        assert isinstance(error, SystemExit) or "are required" in str(error), error
        assert not arguments or arguments == ["--help"] or not positional(arguments), words
        return
    assert not unknown, unknown
    check_settings(getattr(options, "set", []))
    check_files(arguments)


def positional(arguments: list[str]) -> list[str]:
    return [word for word in arguments if not word.startswith("-") and not word.isupper()]


def check_settings(overrides: list[str]) -> None:
    example = str(ROOT / "examples/recipes/stage1.yaml")
    load_recipe(example, [override for override in overrides if override != "KEY=VALUE"])


def check_files(words: list[str]) -> None:
    for word in words:
        if word.startswith(("examples/", "tools/", "benchmarks/", "tests/")):
            assert (ROOT / word).exists(), f"{word} is not there"


def check_torchrun(words: list[str]) -> None:
    start = words.index("-m")
    assert words[start + 1] == "megatron_lpr.cli"
    check_megatron_lpr(words[start + 2 :])


def check_sbatch(words: list[str]) -> None:
    script = next(word for word in words if word.endswith(".sbatch"))
    arguments, text = words[words.index(script) + 1 :], (ROOT / script).read_text(encoding="utf-8")
    if script.endswith("sweep.sbatch"):  # RECIPE LINES FOLDER, and more words of train
        check_megatron_lpr(["train", arguments[0], *arguments[3:]])
    elif 'megatron-lpr train "$@"' in text:
        check_megatron_lpr(["train", *arguments])
    else:
        assert 'megatron-lpr "$@"' in text
        check_megatron_lpr(arguments)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    for word in words:
        name, assigned, _ = word.partition("=")
        if assigned:
            assert re.search(rf"^{name} \??:?=", makefile, re.M), f"no variable {name}"
        else:
            assert name in targets, f"no target {name}"


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in extras, f"no extra {extra}"


def check_python(words: list[str]) -> None:
    """The script is there, and each option stands in it; a tool of several doors knows the door and its options."""
    if words[0] == "-m":
        if words[1] == "megatron_lpr.cli":
            check_megatron_lpr(words[2:])
        else:
            assert words[1] in MODULES
        return
    script = ROOT / words[0]
    options = [word for word in words[1:] if word.startswith("--")]
    check_files(words)
    if script == ROOT / "tools/preprocess_data.py":
        check_megatron_lpr(["preprocess", *words[1:]])
    elif script.parent == ROOT / "tools":
        help = help_of(script, words[1])
        assert not [option for option in options if option not in help]
    else:
        strings = {n.value for n in ast.walk(ast.parse(script.read_text())) if isinstance(n, ast.Constant)}
        assert set(options) <= strings, words


@cache
def help_of(script: Path, door: str) -> str:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            status = module.main([door, "--help"])
        except SystemExit as stop:
            status = stop.code
    assert status == 0, f"{script.name} has no {door}"
    return printed.getvalue()


YAML = [(page, code) for page in PAGES for code in blocks(page.read_text(encoding="utf-8"), "yaml")]


@pytest.mark.parametrize("page, code", YAML, ids=[page.stem for page, _ in YAML])
def test_a_block_of_yaml_is_part_of_a_recipe(page, code, tmp_path):
    (tmp_path / "part.yaml").write_text(code, encoding="utf-8")
    (tmp_path / "common.yaml").write_text("{}")  # what a block may include
    around = {
        "name": "x",
        "output": "runs/x",
        "model": {"base": "models/base", "num_experts": 3},
        "data": {"manifest": "data/manifest.yaml", "seq_length": 1024},
        "train": {"trainable": "routers", "steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    load_recipe(str(tmp_path / "part.yaml"), [], around)


def test_there_are_blocks_of_yaml():
    assert len(YAML) >= 2
