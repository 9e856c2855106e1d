"""The package from Python: its names, its page, its types, and calls that follow one another in one process."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import megatron_lpr
from megatron_lpr.errors import UserError
from megatron_lpr.testing.toy_models import write_toy_project

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.megatron  # the Trainer is one of the names


def run_python(*arguments: str) -> str:
    """What a new process prints."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.check_output([sys.executable, *arguments], text=True, env=environment, cwd=ROOT)


def test_importing_the_package_imports_no_torch():
    program = """
        import sys
        import megatron_lpr
        from megatron_lpr import UserError, load_recipe
        print([name for name in ("torch", "megatron", "numpy", "transformers") if name in sys.modules])
        print(set(megatron_lpr.__all__) <= set(dir(megatron_lpr)))
    """
    assert run_python("-c", textwrap.dedent(program)) == "[]\nTrue\n"


def test_every_name_is_there_and_on_the_page():
    for name in megatron_lpr.__all__:
        assert getattr(megatron_lpr, name).__name__ == name
        assert f"`{name}" in PAGE
    assert megatron_lpr.Trainer.__module__ == "megatron_lpr.training.train"


def test_no_other_name_is():
    with pytest.raises(AttributeError, match="'megatron_lpr' has no attribute 'fly'"):
        megatron_lpr.fly  # noqa: B018
    with pytest.raises(ImportError, match="fly"):
        from megatron_lpr import fly  # noqa: F401


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The folder of a toy project whose corpora are there."""
    from megatron_lpr import cli

    root = tmp_path_factory.mktemp("project")
    recipes = write_toy_project(root)
    assert cli.main(["preprocess", str(recipes["upcycle"])]) == 0
    return root


@pytest.mark.slow
def test_the_page(project, monkeypatch, capsys):
    """Its blocks run one after another, and everything twice would not: each has left Megatron behind."""
    monkeypatch.chdir(project)
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert re.search(r"starts from +checkpoint .*upcycle", printed)
    assert "| stage1 vs base |" in printed and re.search(r"ok +logits", printed)
    assert namespace["metrics"]["step"] == 5 and len(namespace["losses"].seen) == 2
    assert namespace["losses"].seen[0] == namespace["metrics"]["ntp_loss"]  # the same step, by hand and by the loop
    result, report = namespace["stage1"], namespace["report"]
    assert result.model == "stage1" and len(result.routing["qaa"]) == 2
    assert result.parse_special_tokens is False
    assert result == type(result).load("stage1.json")
    assert report.ok and [check.name for check in report.checks][-2:] == ["checkpoint", "logits"]


@pytest.mark.slow
def test_the_hook_of_the_page_on_training(project):
    """Its class, and the call that the page gives it to; any loss is good enough here."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "StopWhenGood" in block)
    (call,) = re.findall(r"`(\S+\(plan, hooks=.*?)`", page)
    overrides = [f"output={project}/hooked", "model.load=null"]
    plan = megatron_lpr.plan(megatron_lpr.load_recipe(project / "stage1.yaml", overrides))
    namespace = {"train": megatron_lpr.train, "plan": plan}
    exec(block.replace("1.5", "99"), namespace)
    with pytest.raises(SystemExit):
        exec(call, namespace)
    assert (project / "hooked/checkpoints/step_00000001").is_dir()


@pytest.mark.slow
def test_a_hugging_face_folder_instead_of_a_checkpoint(project):
    from megatron_lpr import evaluate, load_recipe, upcycle, verify

    recipe = load_recipe(project / "upcycle.yaml")
    folder = upcycle(recipe, hf=project / "moe")
    assert folder == project / "moe" and verify(folder, base=recipe.model.base).ok
    before, after = (evaluate(model, recipe=recipe) for model in (recipe.model.base, folder))
    assert [before.model, after.model] == ["base", "moe"]
    for old, new in zip(before.corpora, after.corpora, strict=True):
        assert new.bits_per_byte == pytest.approx(old.bits_per_byte, rel=1e-5)


def test_a_trainer_outside_a_session_is_told(project, tmp_path):
    from megatron_lpr import Trainer, load_recipe, plan

    run = plan(load_recipe(project / "stage1.yaml", ["model.load=null", f"output={tmp_path}/run"]))
    with pytest.raises(UserError, match="no rank of a run: make a Trainer in `with session"):
        Trainer(run)


def test_what_is_wrong_is_a_user_error(project, tmp_path, megatron):
    from megatron_lpr import evaluate, export, load_recipe, plan, session, upcycle, verify

    recipe = load_recipe(project / "stage1.yaml", ["model.load=null", f"output={tmp_path}/run"])
    with pytest.raises(UserError, match="train: missing"):
        plan(load_recipe(project / "upcycle.yaml"))
    with pytest.raises(UserError, match="model.num_experts: 0"):
        upcycle(load_recipe(project / "dense.yaml"))
    with pytest.raises(UserError, match="no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="against what"):
        verify(project / "base")
    with pytest.raises(UserError, match="is a Hugging Face model: name the recipe"):
        evaluate(project / "base")
    with pytest.raises(UserError, match="is a rank of a run already"), session(plan(recipe)):
        pass


TYPED = """
    from pathlib import Path
    from megatron_lpr import (
        Hook, Manifest, ReplaySampler, Trainer, compare, evaluate, export, load_recipe, plan, session, train, upcycle,
        verify,
    )

    recipe = load_recipe(Path("stage1.yaml"), ["train.steps=10"])
    run = plan(recipe, world_size=2)
    train(run, hooks=[Hook()])
    with session(run):
        trainer: Trainer = Trainer(run)
    folder: Path = upcycle(recipe, hf="out")
    bits: list[float] = [score.bits_per_byte for score in evaluate(folder, recipe=recipe).corpora]
    table: str = compare(["base.json", evaluate(Path("runs"))])
    ok: bool = verify(export("runs", folder), checkpoint="runs").ok
    manifest = Manifest.load("manifest.yaml")
    sampler = ReplaySampler(manifest, seq_length=8, seed=0, mixture={"expanded": 1.0})
    words: tuple[str, ...] = manifest.languages
    reveal_type(sampler.fill(0, 2))
    wrong: int = compare([])
    evaluate(3)
"""


@pytest.mark.slow
def test_types(tmp_path):
    """What a user's type checker knows of the names."""
    pytest.importorskip("mypy")
    file = tmp_path / "typed.py"
    file.write_text(textwrap.dedent(TYPED))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--follow-imports=silent"]
    environment = dict(os.environ, MYPYPATH=str(ROOT))
    done = subprocess.run([*command, str(file)], text=True, capture_output=True, cwd=ROOT, env=environment)
    *told, _ = done.stdout.splitlines()
    lines = textwrap.dedent(TYPED).splitlines()
    expected = {
        "reveal_type(sampler.fill(0, 2))": 'Revealed type is "megatron_lpr.data.sampler.replay_sampler.Batch"',
        "wrong: int = compare([])": 'expression has type "str", variable has type "int"',
        "evaluate(3)": 'Argument 1 to "evaluate" has incompatible type "int"; expected "str | Path"',
    }
    assert len(told) == len(expected), done.stdout
    for line, (what, message) in zip(told, expected.items(), strict=True):
        # by its name: mypy's cache remembers the folder of an earlier test of the same text
        assert f"{file.name}:{lines.index(what) + 1}: " in line and message in line
