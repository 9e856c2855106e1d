"""CONTRIBUTING.md names files, names and rooms that are there; each walk passes at most seven files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WALKS = {
    title: re.findall(r"^\d+\. `([^`]+)`: (.*(?:\n   .*)*)", walk, re.M)
    for title, walk in re.findall(r"^### (.*)\n((?:(?!^#).*\n)+)", PAGE, re.M)
}


def test_every_path_is_there():
    paths = re.findall(r"`((?:megatron_lpr|tests|csrc|docs|examples|tools|benchmarks)/[^`]*)`", PAGE)
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_room_is_in_the_table():
    table = PAGE.split("\n## The rooms\n")[1].split("\n## ")[0]
    there = {path.name for path in (ROOT / "megatron_lpr").iterdir() if path.suffix == ".py" or path.is_dir()}
    there -= {"__init__.py", "__pycache__"}
    named = set(re.findall(r"`(\w+(?:\.py|/))`", table))
    assert {name if name.endswith(".py") else f"{name}/" for name in there} <= named


def test_there_are_two_walks():
    assert len(WALKS) == 2 and all(2 < len(stops) <= 7 for stops in WALKS.values())


@pytest.mark.parametrize("file, text", [stop for stops in WALKS.values() for stop in stops])
def test_a_stop_is_there(file, text):
    """A file of the package or of csrc/, and the functions, classes and methods in it that the text names."""
    path = ROOT / file if file.startswith("csrc/") else ROOT / "megatron_lpr" / file
    source = path.read_text(encoding="utf-8")
    names = re.findall(r"`(\w[\w.]*)`", text)
    assert names, "a stop names what to read"
    for name in names:
        if path.suffix == ".h":
            assert re.search(rf"\b{name.split('.')[-1]}\b", source), name
        else:
            assert defined(ast.parse(source), name.split(".")), f"no {name} in {file}"


def defined(tree: ast.AST, parts: list[str]) -> bool:
    for node in ast.iter_child_nodes(tree):
        names = {getattr(node, "name", None), *(getattr(t, "id", None) for t in getattr(node, "targets", []))}
        if parts[0] in names:
            return len(parts) == 1 or defined(node, parts[1:])
    return False
