"""`megatron-lpr preprocess` as a command: with a whole recipe, a short one, or none."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lpr import cli
from megatron_lpr.data.corpus.manifest import Manifest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "out")


def command(*arguments: str) -> int:
    return cli.main(["preprocess", *arguments])


@pytest.mark.slow
def test_a_recipe_of_preprocessing_alone(write_text, hf_tokenizer, tmp_path, out, capsys):
    files = write_text("a.jsonl", ["fox"]), write_text("b.jsonl.zst", ["dog"])
    corpus = f"{{name: hu, language: hu, role: expanded, files: ['{tmp_path}/?.jsonl*']}}"
    (tmp_path / "r.yaml").write_text(f"preprocess:\n  output: {out}\n  corpora: [{corpus}]\n")
    assert command(str(tmp_path / "r.yaml")) == 2
    assert "preprocess.tokenizer: missing" in capsys.readouterr().err
    assert command(str(tmp_path / "r.yaml"), "--set", f"preprocess.tokenizer={hf_tokenizer}") == 0
    assert Manifest.load(f"{out}/manifest.yaml").corpora[0].documents == len(files)
    assert "hu: hu (expanded), 2 documents" in capsys.readouterr().out


def test_no_recipe(write_text, hf_tokenizer, tmp_path, out, monkeypatch, capsys):
    one = ["--input", write_text("a.jsonl", [b'{"body": "fox"}', b"{"]), "--name", "hu", "--language", "hu"]
    one += ["--role", "expanded", "--tokenizer", hf_tokenizer, "--output", out, "--text-field", "body"]
    assert command(*one, "--dry-run", "--seed", "3") == 0 and not Path(out).exists()
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"tokenizer {hf_tokenizer}: ") and told[-1] == f"would write {out}/manifest.yaml"
    assert told[1:-1] == ["settings other than the defaults: {seed: 3}", "hu: hu (expanded), 1 file(s), 0.0 KB"]
    assert command(*one, "--dry-run", "--output", "~/none/data") == 2  # before hours of work, and not a folder ~
    assert command(*one) == 2
    assert "a.jsonl:2: broken JSON" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *one, "--on-bad-line", "skip", "--seed", "3"])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(ROOT / "tools" / "preprocess_data.py"), run_name="__main__")
    assert status.value.code == 0
    [corpus] = Manifest.load(f"{out}/manifest.yaml").corpora
    assert (corpus.documents, corpus.source.seed, corpus.source.skipped_lines) == (1, 3, 1)
    # A corpus that is there already, under another name.
    assert command("--prefix", corpus.prefix, *one[4:-2], "--name", "again") == 0
    assert [c.name for c in Manifest.load(f"{out}/manifest.yaml").corpora] == ["hu", "again"]
    assert command("--prefix", corpus.prefix, *one[4:-2], "--name", "again", "--dry-run") == 0
    assert f"as it is in {corpus.prefix}.bin, in the manifest already" in capsys.readouterr().out


def test_several_languages_without_a_recipe(write_text, hf_tokenizer, out, capsys):
    path = write_text("a.jsonl", [b'{"text": "fox", "lang": "hu"}', b'{"text": "the", "lang": "en"}'])
    one = ["--input", path, "--name", "web", "--language", "hu", "--role", "expanded", "--tokenizer", hf_tokenizer]
    one += ["--output", out, "--language-field", "lang"]
    assert command(*one) == 2
    advice = "{hu: expanded, en: original}"
    assert f"list them with their roles, as languages: {advice}" in capsys.readouterr().err
    assert command(*one, "--languages", advice) == 0
    [corpus] = Manifest.load(f"{out}/manifest.yaml").corpora
    assert corpus.languages == {"hu": "expanded", "en": "original"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a recipe, or --input"),
        (["r.yaml", "--input", "a", "--text-field", "b"], "--input, --text-field: these stand for a recipe"),
        (["--input", "a"], "missing key 'name'"),
        (["--input", "a", "--name", "hu", "--language", "hu", "--role", "new"], "role: unknown value 'new'"),
        (["--input", "a", "--name", "hu", "--language", "hu", "--role", "expanded"], "preprocess.output: missing"),
        (["--set", "preprocess.workers=-1", "--input", "a", "--name", "hu", "--language", "hu", "--role", "expanded",
          "--output", "o"], "preprocess.workers: -1"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(arguments, message, capsys):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_as_a_process_on_all_cores(write_text, hf_tokenizer, out):
    """Worker processes import the command line's module again: it must not run twice."""
    path = write_text("a.jsonl", ["fox " * 2000] * 1100)  # 9 MB: three blocks
    one = ["--input", path, "--name", "hu", "--language", "hu", "--role", "expanded", "--workers", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "megatron_lpr.cli", "preprocess", *one, "--tokenizer", hf_tokenizer, "--output", out],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert Manifest.load(f"{out}/manifest.yaml").corpora[0].documents == 1100
