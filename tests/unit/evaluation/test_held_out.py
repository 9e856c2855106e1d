"""Held-out text: read as preprocessing reads it, and refused with the names of evaluation's own settings."""

import gzip
import json
import lzma
import shutil
from pathlib import Path

import pytest

from megatron_lpr import cli
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.held_out import check_evaluation, doubts, read_corpus, read_held_out
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.recipe.text_settings import EvaluationConfig, EvaluationCorpus


def corpus(*files, **more) -> EvaluationCorpus:
    tree = {"name": "help", "files": tuple(map(str, files)), "language": "hu", "role": "expanded"} | more
    return EvaluationCorpus(**tree)


def test_every_kind_of_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "abc"}\n\n  \n{"id": 1, "body": "de"}\n')  # blank lines hold nothing
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as out:
        out.write(json.dumps({"body": "é"}) + "\n")
    (tmp_path / "e.txt.xz").write_bytes(lzma.compress(b"packed"))
    (tmp_path / "c.txt").write_text("one\n\ntwo\n")
    (tmp_path / "notes").write_text("f\n")
    assert read_corpus(corpus(tmp_path / "?.jsonl*", text_field="body")) == ["abc", "de", "é"]
    assert read_corpus(corpus(tmp_path / "c.txt")) == ["one\n\ntwo\n"]
    assert read_corpus(corpus(tmp_path / "c.txt", tmp_path / "c.txt", sample_by="line"))[:2] == ["one", "two"]
    assert read_corpus(corpus(tmp_path / "notes", format="text")) == ["f\n"]
    assert read_corpus(corpus(tmp_path / "e.txt.xz")) == ["packed"]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"body": ["x", "y"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert read_corpus(corpus(tmp_path / "d.parquet", text_field="body")) == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "evaluation corpus help: no text in .*bad.jsonl; name other files, or leave it out"),
        ('{"text": ""}\n', "bad.jsonl:1: empty text; .* with evaluation.on_bad_line: skip"),
        ('{"text": "a"}\n{"content": "b"}\n', 'bad.jsonl:2: no "text" string'),
        ('{"text": "a"\n', "bad.jsonl:1: broken JSON"),
    ],
)
def test_bad_lines_name_the_setting_of_evaluation(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_corpus(corpus(tmp_path / "bad.jsonl"))


def test_of_text_in_several_languages_each_is_scored_by_itself(toy_base, tmp_path, capsys):
    lines = [("a", "hu"), ("bb", "en"), ("c", "hu"), ("d", None)]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps({"text": text, "lang": language}) + "\n" for text, language in lines))
    one = {"language_field": "lang", "role": "original"}
    corpora = [corpus(file, name=language, language=language, **one) for language in ("hu", "en")]
    assert read_corpus(corpora[0], "skip") == ["a", "c"] and read_corpus(corpora[1], "skip") == ["bb"]
    with pytest.raises(UserError, match='mixed.jsonl:4: no "lang" string'):
        read_corpus(corpora[0])
    with pytest.raises(UserError, match="no text in .*mixed.jsonl whose lang is 'de'; name other files"):
        read_corpus(corpus(file, language="de", **one), "skip")
    capsys.readouterr()
    for language, warns in (("hu", False), ("en", True)):
        more = corpus(file, name="more", language=language, **(one if warns else one | {"language_field": None}))
        check_evaluation(EvaluationConfig(corpora=(*corpora, more), window=8), str(toy_base))
        assert ("both read" in capsys.readouterr().err) == warns


def test_bad_lines_are_left_out_and_told(toy_base, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": " "}\n')
    settings = EvaluationConfig(corpora=(corpus(tmp_path / "bad.jsonl"),), on_bad_line="skip")
    (text,) = read_held_out(settings, load_tokenizer(str(toy_base)))
    assert text.bytes == 1 and text.scored.tolist() == [False, True, False]
    assert "evaluate help: left out 2 lines (empty text), the first at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpora": ()}, "evaluation.corpora: empty"),
        ({"window": 0}, "evaluation.window: 0; at least 1"),
        ({"batch": -1}, "evaluation.batch: -1; at least 1"),
        ({"max_bytes": -1}, "evaluation.max_bytes: -1; at least 1"),
        ({"max_bytes": 0}, "evaluation.max_bytes: 0; at least 1"),
        ({"window": 65}, "evaluation.window: 65, but the model in .* has 64 positions .*; choose 64 at most"),
    ],
)
def test_sizes_are_checked(tmp_path, settings, message):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    (tmp_path / "a.jsonl").write_text("no JSON, and never read")
    tree = {"corpora": (corpus(tmp_path / "a.jsonl"),), "window": 64} | settings
    with pytest.raises(UserError, match=message):
        check_evaluation(EvaluationConfig(**tree), str(tmp_path))
    good = EvaluationConfig(corpora=(corpus(tmp_path / "a.jsonl"),), window=64, batch=1, max_bytes=1)
    check_evaluation(good, str(tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"files": ("nowhere.jsonl",)}, "evaluation.corpora: two: no file nowhere.jsonl"),
        ({"files": ("none/*.jsonl",)}, "evaluation.corpora: two: no file none/"),
        ({"files": ()}, "evaluation.corpora: two: names no text files"),
        ({"files": ("{folder}/a.jsonl", "{folder}/*.jsonl")}, "corpus 'two' reads .*a.jsonl twice"),
        ({"name": "help"}, "two are called 'help'"),
        ({"role": "original"}, "language 'hu' is expanded in corpus 'help' and original in 'two'"),
        ({"sample_by": "line"}, "two: sets sample_by, which has an effect on plain text only"),
        ({"format": "text", "text_field": "body"}, "two: is plain text, which has no fields"),
        ({"format": "text", "language_field": "lang"}, "two: is plain text, which has no fields"),
    ],
)
def test_corpora_are_checked(tmp_path, more, message):
    (tmp_path / "a.jsonl").write_text("")
    two = {"name": "two", "files": ("{folder}/a.jsonl",)} | more
    two["files"] = tuple(file.format(folder=tmp_path) for file in two["files"])
    corpora = corpus(tmp_path / "a.jsonl"), corpus(**two)
    with pytest.raises(UserError, match=message):
        check_evaluation(EvaluationConfig(corpora=corpora, window=1), str(tmp_path))


@pytest.mark.parametrize("how", ["the same file", "another name for it", "the manifest alone", "neither"])
def test_training_text_among_the_held_out_is_told(tmp_path, how):
    from preprocessing import preprocess

    from megatron_lpr.testing.toy_models import write_toy_text, write_toy_tokenizer

    (tmp_path / "tokenizer").mkdir()
    write_toy_tokenizer(tmp_path / "tokenizer")
    text = write_toy_text(tmp_path / "train.jsonl", "qaa", documents=3)
    (tmp_path / "copy.jsonl").write_bytes(text.read_bytes())
    (tmp_path / "link.jsonl").symlink_to(text)
    write_toy_text(tmp_path / "other.jsonl", "qaa", documents=3, seed=1)
    file = {"another name for it": "link.jsonl", "the manifest alone": "copy.jsonl", "neither": "other.jsonl"}.get(
        how, "train.jsonl"
    )
    entry = {"name": "text", "files": [str(text)], "language": "qaa", "role": "expanded"}
    tree = {
        "name": "r",
        "output": "o",
        "model": {"base": "b"},
        "data": {"manifest": str(tmp_path / "data/manifest.yaml")},
        "preprocess": {"corpora": [entry]},
        "evaluation": {"corpora": [entry | {"name": "held out", "files": [str(tmp_path / file)]}]},
    }
    recipe = from_tree(Recipe, tree, where="test")
    sources = recipe.preprocess.corpora
    preprocess(sources, tokenizer=str(tmp_path / "tokenizer"), output=str(tmp_path / "data"), workers=1)
    sentences = list(doubts(recipe))
    if how == "neither":
        shutil.rmtree(tmp_path / "data")
        text.unlink()
        assert not sentences and not list(doubts(recipe))  # training text need not be there
        return
    [sentence] = sentences
    what = "the very text that corpus text of the manifest" if "manifest" in how else "preprocess.corpora text"
    assert sentence.startswith("evaluation.corpora: held out: ") and what in sentence


def test_text_held_out_of_several_languages_and_scored_as_one_is_told(tmp_path):
    from preprocessing import preprocess

    from megatron_lpr.testing.toy_models import write_toy_tokenizer

    (tmp_path / "tokenizer").mkdir()
    write_toy_tokenizer(tmp_path / "tokenizer")
    lines = [{"text": f"text {n}", "lang": ("hu", "en")[n % 2]} for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    languages = {"hu": "expanded", "en": "original"}
    entry = {"name": "web", "files": [str(tmp_path / "text.jsonl")], "language": "hu", "role": "expanded"}
    held_out = entry | {"files": [str(tmp_path / "data/web.heldout.jsonl.gz")]}
    tree = {
        "name": "r",
        "output": "o",
        "model": {"base": "b"},
        "data": {"manifest": str(tmp_path / "data/manifest.yaml")},
        "preprocess": {"heldout": 0.5, "corpora": [entry | {"languages": languages, "language_field": "lang"}]},
        "evaluation": {"corpora": [held_out, held_out | {"name": "hu", "language_field": "language"}]},
    }
    recipe = from_tree(Recipe, tree, where="test")
    tokenizer, sources = str(tmp_path / "tokenizer"), recipe.preprocess.corpora
    preprocess(sources, tokenizer=tokenizer, output=str(tmp_path / "data"), workers=1, heldout=0.5)
    [sentence] = doubts(recipe)
    assert "web.heldout.jsonl.gz has documents in several languages (hu, en), all scored as hu; with" in sentence
    whole, hungarian = (read_corpus(corpus) for corpus in recipe.evaluation.corpora)
    assert {text for text in whole if int(text.split()[1]) % 2 == 0} == set(hungarian) < set(whole)


@pytest.fixture
def recipe(tmp_path):
    """recipe(**evaluation) -> path of a recipe on a toy model, with one held-out corpus."""
    from megatron_lpr.testing.toy_models import write_toy_model

    base = write_toy_model(tmp_path / "base")
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')

    def write(**evaluation):
        entry = {"name": "a", "files": [str(tmp_path / "a.jsonl")], "language": "x", "role": "expanded"}
        tree = {
            "name": "r",
            "output": str(tmp_path / "out"),
            "model": {"base": str(base)},
            "evaluation": {"window": 16, "corpora": [entry]} | evaluation,
        }
        path = tmp_path / "r.json"
        path.write_text(json.dumps(tree))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("evaluation", "out", "message"),
    [
        ({"batch": -1}, "x.json", "evaluation.batch: -1; at least 1"),
        ({"window": 129}, "x.json", "has 128 positions"),
        ({}, "", "is a folder; name a file"),
        ({}, "a.jsonl/x.json", "cannot be written in"),
    ],
)
def test_the_command_refuses_before_it_reads_a_model(recipe, tmp_path, monkeypatch, capsys, evaluation, out, message):
    def reads(*arguments):
        raise AssertionError("a model was read")

    monkeypatch.setattr("megatron_lpr.evaluation.evaluate.hf_nll_fn", reads)
    for dry_run in ([], ["--dry-run"]):
        path = recipe(**evaluation)
        base = json.loads(Path(path).read_text())["model"]["base"]
        arguments = ["evaluate", base, "--recipe", path, "--name", "n", "--out", str(tmp_path / out), *dry_run]
        assert cli.main(arguments) == 2 and message in capsys.readouterr().err
    assert cli.main([*arguments, "--set", "parallel.tensor=2"]) == 2
    assert f"--set parallel.tensor=2: has no effect on {base}, a Hugging Face model" in capsys.readouterr().err
