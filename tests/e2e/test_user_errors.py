"""What a user can get wrong ends in one sentence, with exit status 2, before any work is done."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_lpr import cli
from megatron_lpr.checkpoint.manifest import sealed
from megatron_lpr.platform import distributed
from megatron_lpr.testing.toy_models import toy_recipes, write_recipe, write_toy_text


@pytest.fixture
def refused(project, tmp_path, monkeypatch, capsys):
    """refused(command, recipe, *arguments) -> the sentence; nothing was started and nothing was written."""

    def no_work(*arguments):
        raise AssertionError("joined the process group")

    monkeypatch.setattr(distributed, "join", no_work)

    def run(command, recipe, *arguments):
        before = sorted(tmp_path.rglob("*"))
        path = project.recipes.get(str(recipe), recipe)
        assert cli.main([command, str(path), *map(str, arguments)]) == 2
        printed, error = capsys.readouterr()
        assert printed == ""
        assert error.startswith(f"megatron-lpr {command}: error: ") and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


def changed(*assignments):
    return [argument for assignment in assignments for argument in ("--set", assignment)]


def copy_of_base(project, folder, **fields):
    """A copy of the base model with other fields in its config.json."""
    shutil.copytree(project.root / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("command", ["train", "upcycle", "preprocess"])
def test_missing_model_folder(refused, tmp_path, command):
    output = changed(f"output={tmp_path}/out", f"preprocess.output={tmp_path}/data", f"model.base={tmp_path}/none")
    assert f"{tmp_path}/none" in refused(command, "stage1", *output)


def test_a_base_model_that_has_moved_since(refused, project, tmp_path):
    """The checkpoint knows where it was, and the sentence how to say where it is."""
    run = shutil.copytree(project.root / "upcycle", tmp_path / "run")
    file = run / "checkpoints/step_00000000/run.json"
    state = json.loads(file.read_text())
    state["recipe"]["model"]["base"] = "models/gone"
    file.write_text(sealed(state))
    told = "its base model was in models/gone, which is not there now"
    out, scores = tmp_path / "out", ["--name", "x", "--out", tmp_path / "x.json"]
    for command, *arguments in (["export", run, out], ["evaluate", run, *scores], ["verify", out, "--checkpoint", run]):
        error = refused(command, *arguments)
        assert told in error and "with --base FOLDER or --set model.base=FOLDER" in error
    base = project.root / "base"
    for where in (["--base", base], changed(f"model.base={base}")):
        project.run("export", run, out, "--dry-run", *where)
    assert "nowhere" in refused("export", run, out, "--base", "nowhere")


@pytest.mark.parametrize("command", ["train", "upcycle"])
def test_unsupported_architecture(refused, project, tmp_path, command):
    base = copy_of_base(project, tmp_path / "falcon", architectures=["FalconForCausalLM"])
    error = refused(command, "stage1", *changed(f"model.base={base}", f"output={tmp_path}/out"))
    assert "FalconForCausalLM" in error and "LlamaForCausalLM" in error


def test_tokenizer_of_another_vocabulary(refused, project, tmp_path):
    base = copy_of_base(project, tmp_path / "other")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = 257
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = refused("train", "stage1", *changed(f"model.base={base}", f"output={tmp_path}/out"))
    assert "tokenizer of another vocabulary" in error and str(base) in error
    base = copy_of_base(project, tmp_path / "smaller", vocab_size=256)
    error = refused("train", "stage1", *changed(f"model.base={base}", f"output={tmp_path}/out"))
    assert "has 257 tokens, but the model embeds 256 " in error


@pytest.mark.parametrize("place", ["", "/run"])
def test_output_inside_the_base_model(refused, project, tmp_path, place):
    base = copy_of_base(project, tmp_path / "base")
    error = refused("train", "stage1", *changed("model.load=null", f"model.base={base}", f"output={base}{place}"))
    assert f"output folder '{base}{place}' is or lies in '{base}', which is read" in error


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_corpus_that_was_altered_after_it_was_written(refused, project, tmp_path, suffix):
    with open(project.recipes["stage1"]) as file:
        recipe = yaml.safe_load(file)
    data = tmp_path / "data"
    shutil.copytree(Path(recipe["data"]["manifest"]).parent, data)
    altered = sorted(data.glob(f"*.{suffix}"))[0]
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    error = refused("train", "stage1", *changed(f"data.manifest={data}/manifest.yaml", f"output={tmp_path}/out"))
    assert f"{altered} does not hold what was written" in error


def test_empty_corpus(refused, project, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    corpora = f"[{{name: x, files: {tmp_path}/empty.jsonl, language: x, role: expanded}}]"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".lock").touch()  # stays where it is
    error = refused(
        "preprocess", "upcycle", *changed(f"preprocess.corpora={corpora}", f"preprocess.output={tmp_path}/data")
    )
    assert "'x' is empty" in error and f"{tmp_path}/empty.jsonl" in error


def test_missing_text(refused, project, tmp_path):
    text = tmp_path / "none.jsonl"
    corpora = f"corpora=[{{name: x, files: {text}, language: x, role: expanded}}]"
    settings = changed(f"preprocess.{corpora}", f"evaluation.{corpora}", f"preprocess.output={tmp_path}/data")
    assert f"preprocess.corpora: x: no file {text}" in refused("preprocess", "upcycle", *settings)
    out = ["--name", "x", "--out", tmp_path / "x.json"]
    corpora = changed(f"evaluation.{corpora}")
    assert f"evaluation.corpora: x: no file {text}" in refused("evaluate", project.root / "upcycle", *corpora, *out)


@pytest.mark.parametrize(
    "assignment, expected",
    [
        ("train.step=3", "unknown key 'step'; did you mean 'steps'?"),
        ("optimiser.lr=1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("train.trainable=router", "unknown value 'router'; did you mean 'routers'?"),
        ("train.steps", "'train.steps': expected section.key=value"),
        ("train.steps=many", "expected int, found 'many'"),
        ("train.steps=1.5", "expected int, found 1.5"),
        ("parallel.distributed_optimizer=1", "expected bool, found 1"),
        ("name.first=x", "'name' is a value, not a section"),
        ("train.steps=0", "train.steps: 0; at least 1"),
        ("parallel.expert=3", "parallel.expert: 3 does not divide the number of new experts"),
        ("model.num_experts=0", "balance.coeff: 0.02 has no effect on a dense model"),
        ("lpr.coeff=0.1", "lpr.coeff: 0.1 without original-language data"),
        ("model.load=nowhere", "checkpoint nowhere: no such folder"),
        ("model.num_experts=4", "model.num_experts: 4, but the checkpoint"),
        ("data.manifest=nowhere.yaml", "no manifest at nowhere.yaml"),
        ("data.mixture={other: 1.0}", "unknown role 'other'"),
        ("data=null", "data: missing"),
    ],
)
def test_recipe_that_cannot_be_run(refused, tmp_path, assignment, expected):
    assert expected in refused("train", "stage1", *changed(f"output={tmp_path}/out", assignment))


def test_dense_recipe_with_review_loss(refused, tmp_path):
    error = refused("train", "dense", *changed(f"output={tmp_path}/out", "lpr.coeff=0.1"))
    assert "lpr.coeff: 0.1 has no effect on a dense model" in error


def test_review_without_original_data_in_the_mixture(refused, tmp_path):
    error = refused("train", "stage2", *changed(f"output={tmp_path}/out", "data.mixture.original=0"))
    assert "lpr.coeff: 0.1 without original-language data" in error


def test_review_without_original_corpus(refused, project, tmp_path, capsys):
    write_toy_text(tmp_path / "qaa.jsonl", "qaa")
    corpora = f"[{{name: x, files: {tmp_path}/qaa.jsonl, language: x, role: expanded}}]"
    alone = changed(f"preprocess.corpora={corpora}", f"preprocess.output={tmp_path}/data")
    project.run("preprocess", "upcycle", *alone)
    capsys.readouterr()
    manifest = f"{tmp_path}/data/manifest.yaml"
    error = refused("train", "stage2", *changed(f"output={tmp_path}/out", f"data.manifest={manifest}"))
    assert "review without original-language data" in error and manifest in error


def test_run_on_other_data(refused, project, trained):
    error = refused("train", "stage1", *changed("train.steps=8", "data.seq_length=16"))
    assert "cannot go on with other data" in error and "seq_length was 32, is 16" in error


def test_run_without_optimizer_state(refused, project, trained, tmp_path):
    shutil.copytree(project.root / "stage2", tmp_path / "run")
    state = tmp_path / "run/checkpoints/step_00000006/run.json"
    state.write_text(sealed(json.loads(state.read_text()) | {"has_optimizer": False}))
    assert "cannot be extended" in refused("train", "stage2", *changed(f"output={tmp_path}/run", "train.steps=8"))


def test_upcycled_already(refused, project):
    assert "already holds a checkpoint" in refused("upcycle", "upcycle")


def test_upcycling_a_dense_recipe(refused, tmp_path):
    assert "model.num_experts: 0" in refused("upcycle", "dense", *changed(f"output={tmp_path}/out"))


def test_recipe_without_training(refused, tmp_path):
    assert "train: missing" in refused("train", "upcycle", *changed(f"output={tmp_path}/out"))


def test_missing_recipe(refused, tmp_path):
    assert f"{tmp_path}/none.yaml: no such file" in refused("train", tmp_path / "none.yaml")


def test_recipe_without_a_required_key(refused, project, tmp_path):
    tree = toy_recipes(project.root)["stage1"]
    del tree["train"]["trainable"]
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    assert "missing key 'trainable'" in refused("train", recipe)


def test_export_over_something(refused, project, trained, tmp_path):
    (tmp_path / "file").touch()
    error = refused("export", project.root / "stage1", tmp_path)
    assert f"'{tmp_path}' exists and is not empty" in error


def test_missing_checkpoint(refused, tmp_path):
    none, out = tmp_path / "none", tmp_path / "out"
    assert f"checkpoint {none}: no such folder" in refused("export", none, out)
    assert f"checkpoint {none}: no such folder" in refused("evaluate", none, "--out", out, "--name", "x")
    assert f"checkpoint {none}: no such folder" in refused("verify", out, "--checkpoint", none)


def test_a_recipe_in_the_place_of_a_checkpoint_and_the_other_way_round(refused, project, trained, tmp_path):
    recipe, run, out = project.recipes["stage1"], project.root / "stage1", tmp_path / "out"
    assert "as export CHECKPOINT OUT [--recipe RECIPE]" in refused("export", recipe, out)
    assert "as evaluate MODEL --name NAME --out FILE" in refused("evaluate", recipe, "--name", "x", "--out", out)
    assert "as verify EXPORT [--checkpoint CHECKPOINT" in refused("verify", recipe)
    assert "as verify EXPORT [--checkpoint CHECKPOINT" in refused("verify", out, "--checkpoint", recipe)
    for command in ("train", "upcycle", "inspect-data", "preprocess"):
        error = refused(command, run)
        assert f"{run} is a checkpoint or the output folder of a run" in error and f"{run}/recipe.yaml" in error
    assert "is a checkpoint" in refused("export", run, out, "--recipe", run)


def test_a_word_too_many_is_told_how_the_arguments_go(refused):
    error = refused("verify", "stage1", "export", "--checkpoint", "run")
    assert "as verify EXPORT [--checkpoint CHECKPOINT | --base BASE]" in error


def test_settings_that_a_checkpoint_decides(refused, project, trained, tmp_path):
    run, scores = project.root / "stage1", ["--name", "x", "--out", tmp_path / "x.json"]
    error = refused("export", run, tmp_path / "out", *changed("model.topk=1"))
    assert "--set model.topk=1: has no effect here" in error and "model.load, export" in error
    assert "--set train.steps=1: has no effect here" in refused("evaluate", run, *scores, *changed("train.steps=1"))
    given = [*changed("train.steps=1"), "--recipe", project.recipes["stage1"]]
    assert "--set train.steps=1: has no effect here" in refused("evaluate", run, *scores, *given)
    assert "--set train.steps=1: has no effect here" in refused("evaluate", project.root / "base", *scores, *given)
    assert "--set train.steps=1: has no effect here" in refused("verify", run.with_name("hf_stage1"), *given)
    both = ["--dtype", "float32", *changed("export.dtype=bfloat16")]
    assert "--dtype: is the setting of --set export.dtype=bfloat16" in refused("export", run, tmp_path / "out", *both)
    assert "did you mean 'window'" in refused("evaluate", run, *scores, *changed("evaluation.windov=1"))


def test_what_has_no_effect_without_a_checkpoint(refused, project, trained, tmp_path):
    base, export, scores = project.root / "base", project.root / "hf_stage1", ["--name", "x", "--out", tmp_path / "x"]
    assert "name the recipe of the held-out text with --recipe" in refused("evaluate", base, *scores)
    assert "which is no checkpoint" in refused("evaluate", base, *scores, "--base", base)
    assert "Give the checkpoint (--checkpoint)" in refused("verify", export)
    assert "--no-logits: logits are compared with --checkpoint only" in refused(
        "verify", export, "--base", base, "--no-logits"
    )
    run = project.root / "stage1"
    assert "--num-frozen 1: has no effect" in refused("verify", export, "--checkpoint", run, "--num-frozen", 1)
    assert "--num-frozen: has no effect on" in refused("verify", run, "--num-frozen", 0)
    assert "--no-logits: has no effect on" in refused("verify", run, "--no-logits")
    assert "nowhere: no such folder" in refused("verify", "nowhere")
    assert "--set evaluation.corpora=[]: has no effect" in refused(
        "verify", export, "--base", base, *changed("evaluation.corpora=[]")
    )


def test_several_processes_for_one(refused, project, trained, tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert "export runs in one process, not in 2" in refused("export", project.root / "stage1", tmp_path / "out")


@pytest.mark.parametrize("command", ["train", "upcycle"])
def test_dry_run_writes_nothing(project, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(distributed, "join", None)
    printed = project.run(command, "stage1", "--dry-run", *changed(f"output={tmp_path}/out"))
    assert not list(tmp_path.iterdir()) and printed
