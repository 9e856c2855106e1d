"""The command line of tools/convert_hf.py: exit status and messages."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def convert_hf():
    spec = importlib.util.spec_from_file_location("convert_hf", ROOT / "tools" / "convert_hf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_upcycle_then_verify(convert_hf, llama, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert convert_hf(["upcycle", str(llama), out, "--num-experts", "4", "--num-frozen", "2"]) == 0
    assert convert_hf(["verify", out, str(llama), "--num-frozen", "2"]) == 0
    assert "27 of 27 equal" in capsys.readouterr().out
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert convert_hf(["verify", out, str(llama)]) == 1
    assert "FAIL  files" in capsys.readouterr().out


def test_a_mistake_of_the_user_is_one_sentence(convert_hf, tmp_path, capsys):
    assert convert_hf(["upcycle", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--num-experts", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model folder") and error.count("\n") == 1


def test_export_is_forwarded_as_it_is(convert_hf, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "megatron_lpr.cli", SimpleNamespace(main=lambda argv: seen.append(argv) or 7))
    assert convert_hf(["export", "recipe.yaml", "--set", "a=1"]) == 7
    assert seen == [["export", "recipe.yaml", "--set", "a=1"]]


@pytest.mark.parametrize("command", [[], ["upcycle"], ["verify"]])
def test_help(convert_hf, capsys, command):
    with pytest.raises(SystemExit) as stop:
        convert_hf([*command, "--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
