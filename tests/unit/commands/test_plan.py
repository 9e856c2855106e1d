"""`megatron-lpr plan`: layouts that fit and that a run accepts, or what does not fit; from a config.json alone."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_lpr import cli
from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.checks import check_recipe
from megatron_lpr.recipe.reading import load_recipe

RECIPE = "examples/recipes/stage1.yaml"


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])


def plan(*words):
    return cli.main(["plan", RECIPE, *words])


@pytest.mark.slow
def test_lines_to_paste_are_a_run(tmp_path, capsys):
    assert plan("--gpus", "16", "--set", "model.base=examples/plan/qwen3-8b") == 0
    printed = capsys.readouterr().out
    assert "does not fit: " in printed, "the recipe's own layout"
    lines = printed.split("lines for the recipe, of the first:\n")[1]
    pasted = tmp_path / "pasted.yaml"
    pasted.write_text(f"include: {Path(RECIPE).resolve()}\nmodel: {{base: examples/plan/qwen3-8b}}\n{lines}")
    recipe = load_recipe(str(pasted))
    assert yaml.safe_load(lines)["parallel"]["pipeline"] == recipe.parallel.pipeline > 1
    check_recipe(recipe, read_architecture(recipe.model.base), 16)


@pytest.mark.slow
def test_for_programs(capsys):
    words = ["--set", "model.base=examples/plan/llama-3.2-1b", "--set", "optimizer.lr=1", "--json"]
    assert plan("--gpus", "8", "--gpu", "a100", *words) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: --set optimizer.lr=1: has no effect here, where model, data,")
    tree = json.loads(printed.out)
    assert tree["own"]["fits"] and tree["own"]["parallel"]["expert"] == 8
    assert tree["gpu"]["memory"] == 80 * 10**9
    memory = tree["own"]["memory"]
    assert memory["total"] == sum(held for kind, held in memory.items() if kind != "total")
    seconds = [layout["seconds"]["total"] for layout in tree["layouts"]]
    assert seconds == sorted(seconds) and all(layout["fits"] for layout in tree["layouts"])


@pytest.mark.slow
def test_of_micro_batches_with_one_bound_the_largest_that_fits_is_proposed(capsys):
    one = ["--gpus", "1", "--json", "--set", "model.base=examples/plan/llama-3.2-1b", "--set", "parallel.expert=1"]
    assert plan(*one, "--set", "model.num_experts=3") == 0
    own, best = (tree := json.loads(capsys.readouterr().out))["own"], tree["layouts"][0]
    assert best["seconds"]["total"] == pytest.approx(own["seconds"]["total"])
    assert best["train"]["micro_batch_size"] == 16 > own["train"]["micro_batch_size"]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["overlap_frozen=on", "dispatcher=flex"])
def test_what_a_gpu_is_needed_for_is_planned_without_one(setting, capsys):
    """Every layout was refused, as if nothing divided the GPUs."""
    layout = ["parallel.expert=8", "parallel.frozen=replicated", f"parallel.{setting}"]
    words = [word for override in layout for word in ("--set", override)]
    assert plan("--gpus", "8", "--json", "--set", "model.base=examples/plan/llama-3.2-1b", *words) == 0
    assert (tree := json.loads(capsys.readouterr().out))["own"] and tree["layouts"]


@pytest.mark.slow
def test_where_no_layout_is_possible_the_recipes_own_tells_why(capsys):
    assert plan("--gpus", "7", "--set", "model.base=examples/plan/llama-3.2-1b") == 0
    printed = capsys.readouterr().out
    own, others = printed.split("the recipe's own layout cannot be: ")[1].split("no other layout is possible: ")
    assert "8 does not divide the number of ranks, 7" in own and "the same stands against each" in others


@pytest.mark.slow
def test_where_nothing_fits_the_first_kind_is_named(capsys):
    assert plan("--gpus", "8", "--memory", "79.5", "--set", "model.base=examples/plan/qwen2.5-32b") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 x h100: 79.50 GB each, of which 71.55 GB are planned with")
    nearest = printed.split("no layout fits; the nearest, ")[1].splitlines()[0]
    assert "micro batch 1, recompute full: does not fit: " in nearest
    assert "the first that does not fit is " in printed.split("no layout fits")[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--gpus", "8", "--gpu", "h10"], "--gpu h10: not in the table; "),
        (["--gpus", "8", "--gpu", "h10"], "and give its GB with --memory; did you mean 'h100'?"),
        (["--gpus", "8", "--memory", "0"], "--memory 0: no GB of a GPU"),
        (["--gpus", "8", "--memory", "nan"], "--memory nan: no GB of a GPU"),
        (["--gpus", "8", "--set", "model.topk=99"], "model.topk: 99 of 9 experts"),
    ],
)
def test_what_is_wrong(words, message, capsys):
    assert plan(*words, "--set", "model.base=examples/plan/llama-3.2-1b") == 2
    assert message in capsys.readouterr().err
