"""Every message that docs/when-something-goes-wrong.md explains is one that the program says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "when-something-goes-wrong.md"
GAP = "…"  # stands for what differs from time to time


@cache
def said() -> str:
    """All string literals of the program, with a gap for each value; those that Python or C++ joins are joined."""
    literals = []
    for path in sorted([*ROOT.glob("megatron_lpr/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("examples/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                literals.append("".join(p.value if isinstance(p, ast.Constant) else GAP for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(node.value)
    for path in sorted(ROOT.glob("csrc/*.h")):
        text = re.sub(r'"\s*\n\s*"', "", path.read_text(encoding="utf-8"))
        literals += re.findall(r'"((?:[^"\\\n]|\\.)*)"', text)
    return "\n".join(" ".join(literal.split()) for literal in literals)


def messages() -> list[str]:
    return re.findall(r"^\| `([^`|]+)` \|[^|]+\|[^|]+\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_row_is_a_message():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(messages()) == len(rows) > 30
    assert len(set(messages())) == len(rows), "a message is there twice"


@pytest.mark.parametrize("message", messages())
def test_message_is_said(message):
    fragments = [fragment.strip() for fragment in message.split(GAP)]
    long = [fragment for fragment in fragments if len(fragment) >= 8]
    assert long, f"too short to be looked for: {message}"
    missing = [fragment for fragment in long if fragment not in said()]
    assert not missing, f"no message of the program says {missing}"
