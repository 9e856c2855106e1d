"""Where each token of a text goes: the shares of `evaluate`, the text of each token, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers
from toy_run import write_run

from megatron_lpr import cli
from megatron_lpr.checkpoint.own_recipe import own_recipe
from megatron_lpr.checkpoint.run_state import checkpoint_folder
from megatron_lpr.data.text.special_tokens import SpecialTokens
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.evaluation.token_routing import pieces, plan_routing, read_texts
from megatron_lpr.evaluation.windows import tokenized
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.recipe.text_settings import EvaluationCorpus
from megatron_lpr.testing.toy_models import write_toy_project

DOCUMENTS = ["a fox\nzt 🦊 árvíz", '<b>tűz</b> & "the" wind', "ő"]


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory):
    """A run that Megatron has written: three experts, one of them frozen, and routers with opinions of their own."""
    root = tmp_path_factory.mktemp("project")
    assert cli.main(["upcycle", str(write_toy_project(root)["upcycle"])]) == 0
    return root / "upcycle"


@pytest.fixture
def checkpoint(toy_base, tmp_path):
    return write_run(toy_base, tmp_path / "run", recipe={"evaluation": {"window": 48}})


@pytest.mark.megatron
def test_the_shares_are_those_of_evaluate(upcycled, tmp_path, capsys):
    """Of texts that are longer than a window, which no number of windows fills, several windows at once."""
    result, page = tmp_path / "result.json", tmp_path / "new" / "page.html"
    windows = ["--set", "evaluation.window=48", "--set", "evaluation.batch=2"]
    assert cli.main(["evaluate", str(upcycled), "--name", "x", "--out", str(result), *windows]) == 0
    routing = EvaluationResult.load(result).routing
    recipe = recipe_of(upcycled, window=48, batch=2)
    files = [str(upcycled.parent / f"text/{language}.heldout.jsonl") for language in routing]
    *routed, prompt = plan_routing(checkpoint_folder(upcycled), recipe).run(read_texts(files, ["the fox"]))
    for text, shares in zip(routed, routing.values(), strict=True):
        assert text.frozen_slots(1).mean(0).tolist() == pytest.approx(shares, abs=1e-12)
        assert text.pieces[-1].last == len(text.chosen_TLE) > 96
        assert [piece.first for piece in text.pieces[1:]] == [piece.last for piece in text.pieces[:-1]]
        assert np.allclose(text.weights_TLE.sum(-1), 1) and np.all((text.weights_TLE > 0) == text.chosen_TLE)
    assert "".join(piece.text for piece in prompt.pieces) == "<eos>the fox"
    capsys.readouterr()
    words = ["--text", files[0], "--prompt", "the fox", "--layer", "1", "--out", str(page), *windows]
    assert cli.main(["route", str(upcycled), *words]) == 0
    table = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    assert [line[1].strip() for line in table[2:4]] == [files[0], "prompt 1"]
    share = f"{100 * np.mean(next(iter(routing.values()))):.1f}%"
    assert table[2][3].strip() == share and table[-1] == [f"-> {page}"]
    assert f">{share}</td>" in page.read_text() and "layer 1" in page.read_text()


@pytest.mark.megatron
def test_a_token_s_route_does_not_depend_on_the_batch(upcycled):
    """The rows of a router's output go back to their tokens."""
    texts = {"x": [DOCUMENTS[0] * 9]}
    one, three = (
        plan_routing(checkpoint_folder(upcycled), recipe_of(upcycled, window=32, batch=batch)).run(texts)[0]
        for batch in (1, 3)
    )
    assert one.chosen_TLE.std(0).max() > 0 and np.array_equal(one.chosen_TLE, three.chosen_TLE)
    assert np.allclose(one.weights_TLE, three.weights_TLE, atol=1e-5)


def recipe_of(run, **evaluation) -> Recipe:
    return own_recipe(checkpoint_folder(run), [f"evaluation.{key}={value}" for key, value in evaluation.items()])


def with_bos(folder, toy_base):
    tokenizer = tokenizers.Tokenizer.from_file(str(toy_base / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "bos_token": "<s>"}))
    return load_tokenizer(str(folder), special=SpecialTokens(bos="true"))


@pytest.mark.parametrize("bos", [False, True])
def test_pieces_are_the_stream_and_show_every_character_once(toy_base, tmp_path, bos):
    tokenizer = with_bos(tmp_path, toy_base) if bos else load_tokenizer(str(toy_base))
    corpus = EvaluationCorpus(name="x", files=("x",), language="", role="original")
    stream = tokenized(tokenizer, corpus, DOCUMENTS).stream[:-1].tolist()
    found = list(pieces(tokenizer, DOCUMENTS))
    assert [place for piece in found for place in range(piece.first, piece.last)] == list(range(len(stream)))
    between, opening = ("<eos>", "<s>") if bos else ("", "<eos>")
    assert "".join(piece.text for piece in found) == opening + f"{between}{opening}".join(DOCUMENTS)
    for piece in found:
        ids = stream[piece.first : piece.last]
        assert ", ".join(map(str, ids)) in piece.label
        if not piece.is_control:  # a token of the toy is a byte
            assert len(piece.text) == 1 and len(ids) == len(piece.text.encode())


def test_tokens_with_a_part_of_a_character_and_more(hf_like):
    """A token may end one character and begin the next; nothing is drawn twice, and no token is left out."""
    text = "x🦊űa ű"
    found = list(pieces(hf_like, [text]))
    assert "".join(piece.text for piece in found[1:]) == text
    assert [piece.first for piece in found[1:]] == [piece.last for piece in found[:-1]]


@pytest.fixture(scope="module")
def hf_like(tmp_path_factory):
    """A byte-level BPE tokenizer whose merges cross the borders of characters."""
    folder = tmp_path_factory.mktemp("merged")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=266,
        special_tokens=["<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["x🦊űa", "🦊ű🦊ű", "űaűa"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no text: name a file with --text FILE, or give words with --prompt"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompt", "a\udcff"], r"'a\udcff': is not UTF-8"),
        (["--text", "nowhere.txt"], "no file nowhere.txt"),
        (["--text", "EMPTY"], "empty text; correct it, or leave it out"),
        (["--text", "LINES"], "no text in it"),
        (["--text", "TEXT", "--text", "TEXT"], "is there twice; name it once"),
        (["--prompt", "a", "--layer", "2"], "--layer 2: has no experts; layers 0 to 1 of"),
        (["--prompt", "a", "--set", "evaluation.window=1000"], "has 128 positions"),
        (["--prompt", "a", "--set", "evaluation.every=1"], "--set evaluation.every=1: has no effect here"),
    ],
)
def test_what_is_refused(checkpoint, tmp_path, capsys, words, message):
    for name, text in (("EMPTY", ""), ("TEXT", "fox")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "LINES.jsonl").write_text("\n\n")
    there = {"EMPTY": "EMPTY.txt", "LINES": "LINES.jsonl", "TEXT": "TEXT.txt"}
    words = [str(tmp_path / there[word]) if word in there else word for word in words]
    arguments = ["route", str(checkpoint), *words, "--out", str(tmp_path / "page.html"), "--dry-run"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_models_that_route_nothing_and_places_to_write(toy_base, checkpoint, tmp_path, monkeypatch, capsys):
    dense = write_run(toy_base, tmp_path / "dense", recipe={"model": {"base": str(toy_base), "num_experts": 0}})
    prompt = ["--prompt", "a", "--out", str(tmp_path / "page.html")]
    folder = ["--prompt", "a", "--out", str(tmp_path)]
    for words, message in (
        ([str(dense), *prompt], "holds a dense model, which routes nothing: give a checkpoint with experts"),
        ([str(toy_base), *prompt], "no checkpoint there"),
        ([str(checkpoint), *folder], "is a folder; name a file, as"),
        (
            [str(checkpoint), "--prompt", "a", "--out", str(tmp_path / "text.txt")],
            "text.txt: is no name of a page; let it",
        ),
    ):
        assert cli.main(["route", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert cli.main(["route", str(checkpoint), *prompt, "--dry-run"]) == 0
    assert "would write the routing of prompt 1 by" in capsys.readouterr().out
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert cli.main(["route", str(checkpoint), *prompt]) == 2
    assert "route runs in one process, not in 2" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
