"""What two models say, side by side."""

import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_lpr.testing.toy_models import write_toy_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("quickstart_generate", ROOT / "examples/quickstart/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_each_model_goes_on_from_each_prompt(generate, toy_base, tmp_path, monkeypatch, capsys):
    other = write_toy_model(tmp_path / "other", seed=1)
    prompts = ["tűz", "the wind"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    monkeypatch.setattr(sys, "argv", ["generate.py", str(toy_base), str(other), *words, "--tokens", "5"])
    assert generate.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("* **tűz** …", "  * base", "  * export", "* **the wind** …", "  * base", "  * export")
    ]
    of_base, of_other = generate.continuations(toy_base, prompts, 5), generate.continuations(other, prompts, 5)
    answers = [line.split(": ", 1)[1] for line in lines if line.startswith("  ")]
    assert answers == [of_base[0], of_other[0], of_base[1], of_other[1]] and of_base != of_other
    assert not any(answer.startswith(prompt) for answer in answers for prompt in prompts)


@pytest.mark.parametrize(
    "more, message", [([], "is no folder of a Hugging Face model"), (["--tokens", "0"], "--tokens 0: at least 1")]
)
def test_mistakes(generate, toy_base, tmp_path, monkeypatch, more, message):
    other = toy_base if more else tmp_path
    monkeypatch.setattr(sys, "argv", ["generate.py", str(toy_base), str(other), *more])
    with pytest.raises(SystemExit, match=message):
        generate.main()
