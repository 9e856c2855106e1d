"""A base model whose tokenizer puts a BOS token before a text: in the corpora, in training and in evaluation."""

import json

import pytest

from megatron_lpr import cli
from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.testing.toy_models import write_toy_project

TOKEN = "ÿ"  # byte 255, which no text in UTF-8 holds


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Root folder, recipes and the BOS token's id; the corpora are there, a run of two steps too."""
    root = tmp_path_factory.mktemp("bos")
    recipes = write_toy_project(root)
    config = root / "base" / "tokenizer_config.json"
    vocabulary = json.loads((root / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": TOKEN, "add_bos_token": True}))
    two_steps = ["--set", "model.load=null", "--set", "train.steps=2"]
    for command in (["preprocess", recipes["stage1"]], ["train", recipes["stage1"], *two_steps]):
        assert cli.main(list(map(str, command))) == 0
    return root, recipes, vocabulary[TOKEN]


def test_corpora(project):
    root, _, bos = project
    manifest = Manifest.load(str(root / "data/manifest.yaml"))
    assert manifest.tokenizer.bos_id == bos
    for entry in manifest.corpora:
        corpus = IndexedCorpus(entry.prefix)
        assert {int(corpus.document(index)[0]) for index in range(len(corpus))} == {bos}


def test_the_model_and_its_base_read_documents_alike(project, tmp_path, capsys):
    root, recipes, bos = project

    def evaluate(name, model, *arguments):
        command = ["evaluate", model, "--name", name, "--out", tmp_path / f"{name}.json", *arguments]
        return cli.main(list(map(str, command)))

    base, checkpoint = [root / "base", "--recipe", recipes["stage1"]], [root / "stage1"]
    without = ["--set", "preprocess.bos=false"]
    assert evaluate("base", *base) == evaluate("trained", *checkpoint) == 0
    for name in ("base", "trained"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["bos_id"] == bos
    assert evaluate("trained", *checkpoint, *without) == 2
    told = f"learned from documents that open with {bos}; evaluate it, and the base model, with preprocess.bos: auto"
    assert told in capsys.readouterr().err
    assert evaluate("other", *base, *without) == 0
    assert cli.main(["compare", *(str(tmp_path / f"{name}.json") for name in ("other", "trained"))]) == 2
    assert "evaluate both with the same preprocess.bos" in capsys.readouterr().err


def test_training_wants_the_documents_of_the_recipe(project, tmp_path, capsys):
    root, recipes, bos = project
    settings = ["--set", "model.load=null", "--set", f"output={tmp_path}/out"]
    train = ["train", str(recipes["stage1"]), "--dry-run", *settings]
    assert cli.main([*train, "--set", "preprocess.bos=false"]) == 2
    assert (
        f"manifest.yaml holds documents that open with token {bos}, where the tokenizer and preprocess.bos put no "
        "token before a text; preprocess the corpora again, or set preprocess.bos: true"
    ) in capsys.readouterr().err
    assert cli.main([*train, "--set", "preprocess.parse_special_tokens=true"]) == 0
    assert "warning      the corpora were made with parse_special_tokens: false" in capsys.readouterr().out
    manifest = root / "data/manifest.yaml"
    text = manifest.read_text()
    try:
        manifest.write_text(text.replace(f"  bos_id: {bos}\n", ""))  # from before the setting
        assert cli.main(train) == 2
        assert "holds documents that open with no BOS token" in (error := capsys.readouterr().err)
        assert "or set preprocess.bos: false" in error
        assert cli.main([*train, "--set", "preprocess.bos=false"]) == 0
    finally:
        manifest.write_text(text)
