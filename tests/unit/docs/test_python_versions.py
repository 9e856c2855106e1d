"""The versions of Python that pip lets in are those that the README names and that `make` lets in."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_python_versions_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, after = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups())
    assert f"Python 3.{first} to 3.{after - 1}" in (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"(3, {first}) <= sys.version_info < (3, {after})" in makefile
    named = ", ".join(f"3.{minor}" for minor in range(first, after - 1))
    assert f"needs Python {named} or 3.{after - 1};" in makefile
