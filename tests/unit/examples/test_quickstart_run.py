"""The commands that the quickstart runs are commands, with recipes and settings that there are; its arms compare."""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from manifest_entries import entry, tokenizer_record

from megatron_lpr import cli
from megatron_lpr.commands.command import all_commands
from megatron_lpr.commands.options import typed_recipe
from megatron_lpr.data.corpus.indexed import IndexedWriter
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.reading import load_recipe

ROOT = Path(__file__).parents[3]


ARMS = ["dense", "stage1", "review_without_lpr", "stage2"]


@pytest.fixture
def quickstart(monkeypatch):
    spec = importlib.util.spec_from_file_location("quickstart_run", ROOT / "examples/quickstart/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "get_base", lambda: None)
    for name in ("generate", "report"):
        monkeypatch.setattr(module.Quickstart, name, lambda *arguments: None)
    return module.Quickstart


@pytest.mark.parametrize("smoke", [False, True])
def test_every_step_is_a_command(quickstart, tmp_path, monkeypatch, smoke):
    ran = []

    def read(command, options):
        recipe = typed_recipe(options) if getattr(options, "recipe", None) else None
        ran.append((command.name, recipe))

    commands = [dataclasses.replace(c, run=lambda options, c=c: read(c, options)) for c in all_commands()]
    monkeypatch.setattr(cli, "all_commands", lambda: commands)
    quickstart(tmp_path, smoke).run()
    assert [name for name, _ in ran] == [
        *("preprocess", "evaluate", "train", "evaluate", "upcycle", *(["train", "evaluate"] * 3)),
        *("export", "verify", "plot"),
    ]
    trained = {Path(recipe.output).name: recipe for name, recipe in ran if name == "train"}
    assert list(trained) == ARMS
    assert all(recipe.output == f"{tmp_path}/{arm}" for arm, recipe in trained.items())
    loads = [None, f"{tmp_path}/upcycled", *[f"{tmp_path}/stage1"] * 2]
    assert [recipe.model.load for recipe in trained.values()] == loads
    assert all((recipe.train.steps == 2) == smoke for recipe in trained.values())
    assert {recipe.data.manifest for recipe in trained.values()} == {f"{tmp_path}/data/manifest.yaml"}


def test_what_is_done_is_left_out(quickstart, tmp_path, monkeypatch, capsys):
    run = []
    monkeypatch.setattr(cli, "main", lambda words: run.append(words) or 0)
    quickstart(tmp_path, smoke=True).run()
    first = len(run)
    files = ("upcycled/checkpoints/latest", "base.json", "dense.json", "export/config.json")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    quickstart(tmp_path, smoke=True).run()
    printed = capsys.readouterr().out
    assert all(f"already done: {tmp_path / file}\n" in printed for file in files)
    assert len(run) == 2 * first - len(files)


@pytest.mark.parametrize("begun", ["base.json", "stage1"])
def test_runs_of_other_recipes_are_not_put_into_the_table(quickstart, tmp_path, monkeypatch, begun):
    monkeypatch.setattr(cli, "main", lambda words: 0)
    former, smoke = tmp_path / "former", tmp_path / "smoke"
    (former / begun).mkdir(parents=True)
    with pytest.raises(SystemExit, match="former holds runs of other recipes or other text"):
        quickstart(former, smoke=False).run()
    assert not (former / "settings.sha256").exists()
    quickstart(smoke, smoke=True).run()
    (smoke / begun).mkdir()
    quickstart(smoke, smoke=True).run()
    with pytest.raises(SystemExit, match="smoke holds runs of other recipes"):
        quickstart(smoke, smoke=False).run()


def test_a_command_that_fails_ends_it(quickstart, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda words: 2)
    with pytest.raises(SystemExit, match="megatron-lpr preprocess failed"):
        quickstart(tmp_path, smoke=True).run()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("No module named 'gguf'"), "No module named 'gguf'; pip install '.[quickstart]'"),
        (UserError("pip could not download it"), "pip could not download it"),
        (PermissionError(13, "Permission denied", "runs"), "Permission denied: 'runs'"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(quickstart, tmp_path, monkeypatch, error, told):
    def run(self):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit, match="^quickstart: ") as ended:
        quickstart.__init__.__globals__["main"]()
    assert told in str(ended.value)


def test_arms_read_the_same_samples(tmp_path):
    """Dense and stage 1 batch by batch, and so both reviews; under the recipes' own settings."""
    manifest = toy_manifest(tmp_path)
    recipes = {arm: load_recipe(str(ROOT / f"examples/quickstart/recipes/{arm}.yaml")) for arm in ARMS}

    def samples(arm: str) -> np.ndarray:
        train = recipes[arm].train
        sampler = ReplaySampler.of(manifest, recipes[arm].data, train.seed)
        return sampler.fill(0, train.steps * train.global_batch_size).tokens_BS

    read = {arm: samples(arm) for arm in ARMS}
    np.testing.assert_array_equal(read["dense"], read["stage1"])
    np.testing.assert_array_equal(read["review_without_lpr"], read["stage2"])
    assert read["dense"].shape != read["stage2"].shape
    for one, other in (("dense", "stage1"), ("review_without_lpr", "stage2")):
        batches = [(recipes[arm].train.steps, recipes[arm].train.global_batch_size) for arm in (one, other)]
        assert batches[0] == batches[1] and recipes[one].optimizer == recipes[other].optimizer


def toy_manifest(folder: Path) -> Manifest:
    """Random tokens under the names of the quickstart's corpora."""
    corpora = []
    for number, (name, language, role) in enumerate((("lohelp.hu", "hu", "expanded"), ("lohelp.en", "en", "original"))):
        tokens = np.random.default_rng(number).integers(3, 1000, 70_000)
        with IndexedWriter(str(folder / name), 1000) as writer:
            writer.add_documents(tokens.astype(writer.dtype), np.array([len(tokens)], np.int32))
        more = {"prefix": str(folder / name), "tokens": len(tokens), "digest": f"{number:064x}"}
        corpora.append(entry(name, role, language=language, **more))
    return Manifest(path="manifest.yaml", tokenizer=tokenizer_record(1000, eod_id=2), corpora=tuple(corpora))
