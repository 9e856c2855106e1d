"""What `benchmarks/serving.py` says of two answers, without an engine."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks/serving.py"


@pytest.fixture(scope="module")
def serving():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        import serving

        return serving


@pytest.fixture
def answers(serving):
    """One prompt of three tokens, whose followers transformers knows all of, and an engine some of."""
    expected = serving.Answer([{0: -1.0, 1: -2.0, 2: -3.0}, {0: -4.0, 1: -0.5, 2: -2.0}], [5, 6, 7])
    found = serving.Answer([{0: -1.0, 1: -2.25}, {1: -0.5}], [5, 6, 8, 9], [3, 4, 5])
    return expected, found


def test_differences_are_of_the_tokens_that_the_engine_tells(serving, answers):
    expected, found = answers
    compared = serving.compare([[3, 4, 5]], [expected], [found])
    assert (compared.largest, compared.top, compared.positions) == (0.25, 2, 2)
    # of the four tokens of the longer continuation two come before the first that differs
    assert (compared.continued, compared.to_continue, compared.tokenized) == (2, 4, True)
    assert "| vllm | float32 | 2 | 2.5e-01 | 100.0% | 2 of 4 |" in serving.table("vllm", "float32", compared)


def test_another_top_token_and_other_tokens_are_told(serving, answers):
    expected, _ = answers
    found = serving.Answer([{0: -1.0, 1: -0.9}, {1: -0.5}], [5, 6, 7], [3, 4])
    compared = serving.compare([[3, 4, 5]], [expected], [found])
    assert compared.top == 1 and compared.continued == compared.to_continue == 3
    assert "tokens of the texts are others" in serving.table("llama.cpp", "f32.gguf", compared)


def test_a_nan_is_the_largest_difference(serving, answers):
    expected, _ = answers
    found = serving.Answer([{0: float("nan")}, {1: -0.5}], [])
    assert serving.compare([[3, 4, 5]], [expected], [found]).largest == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "missing"), [("vllm", "vLLM is not installed"), ("llama.cpp", "--gguf")])
def test_what_is_missing_is_said_in_a_sentence(engine, missing, tmp_path):
    """Without an engine, and for llama.cpp with one but without the file that it reads."""
    (tmp_path / "llama_cpp.py").touch()
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "--engine", engine],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and missing in done.stderr and "Traceback" not in done.stderr
