"""The package from Python: its names, its page, its types, and calls that follow one another in one process."""

import concurrent.futures
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

import megatron_lpr
from megatron_lpr.errors import Stopped, UserError
from megatron_lpr.platform.watchdog import watchdog
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


@pytest.fixture(scope="module")
def stage1(project):
    """Plans a run of two steps."""

    def planned(output, **how):
        overrides = [f"output={output}", "model.load=null", "train.steps=2"]
        return megatron_lpr.plan(megatron_lpr.load_recipe(project / "stage1.yaml", overrides), **how)

    return planned


def train_and_evaluate(project, plan):
    """The losses of a run, the bits per byte of what it has learned, and those of its base."""
    seen = []

    class Losses(megatron_lpr.Hook):
        def after_step(self, trainer, metrics):
            seen.append(metrics["ntp_loss"])

    megatron_lpr.train(plan, hooks=[Losses()])
    scores = megatron_lpr.evaluate(plan.recipe.output), megatron_lpr.evaluate(project / "base", recipe=plan.recipe)
    return seen, [[corpus.bits_per_byte for corpus in score.corpora] for score in scores]


@pytest.mark.slow
def test_what_the_caller_has_set_in_torch_changes_nothing_and_stays(project, stage1, tmp_path):
    """The default device of many notebooks is a GPU; meta, which has no data, stands for it here."""
    expected = train_and_evaluate(project, stage1(tmp_path / "plain"))
    hook, state = sys.excepthook, torch.manual_seed(7).get_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        found = train_and_evaluate(project, stage1(tmp_path / "run"))
        folder = megatron_lpr.export(tmp_path / "run", tmp_path / "export")
        assert megatron_lpr.verify(folder, checkpoint=tmp_path / "run").ok
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_default_device().type == "meta"
    assert found == expected
    assert sys.excepthook is hook and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_calls_in_another_thread(project, stage1, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        losses, _ = thread.submit(train_and_evaluate, project, stage1(tmp_path / "run")).result()
    assert len(losses) == 2


@pytest.mark.slow
def test_calls_leave_nothing_open(stage1, tmp_path):
    megatron_lpr.train(stage1(tmp_path / "run"))
    process = psutil.Process()
    for _ in range(2):
        megatron_lpr.evaluate(tmp_path / "run")
    files, threads = process.num_fds(), process.num_threads()
    megatron_lpr.evaluate(tmp_path / "run")
    deadline = time.monotonic() + 20  # a thread that ends is there for a moment more
    while process.num_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.num_fds() <= files and process.num_threads() <= threads


def test_a_session_is_of_one_trainer_and_its_plan(stage1, tmp_path):
    run = stage1(tmp_path / "run")
    with megatron_lpr.session(run):
        trainer = megatron_lpr.Trainer(run)
        with pytest.raises(UserError, match="has a Trainer already"):
            megatron_lpr.Trainer(run)
        with pytest.raises(UserError, match="is a rank of a run already"):
            megatron_lpr.train(stage1(tmp_path / "another"))
        assert trainer.train_step()["step"] == 1 and watchdog()
    for call in (trainer.train_step, trainer.save):
        with pytest.raises(UserError, match="the session of this Trainer has ended"):
            call()
    with pytest.raises(UserError, match="on 2 ranks, and 1 are here"):
        megatron_lpr.train(stage1(tmp_path / "run", world_size=2))
    with pytest.raises(UserError, match="the number of ranks: 0"):
        stage1(tmp_path / "run", world_size=0)
    assert not any((tmp_path / name).exists() for name in ("run", "another"))


def test_the_end_of_a_stopped_run_can_leave_a_process():
    assert pickle.loads(pickle.dumps(Stopped())).code == 75


def test_what_is_wrong_is_a_user_error(project, tmp_path, megatron):
    from megatron_lpr import evaluate, export, load_recipe, plan, session, upcycle, verify

    recipe = load_recipe(project / "stage1.yaml", ["model.load=null", f"output={tmp_path}/run"])
    with pytest.raises(UserError, match=re.escape("a list, as ['train.steps=4']")):
        load_recipe(project / "stage1.yaml", "train.steps=4")
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
