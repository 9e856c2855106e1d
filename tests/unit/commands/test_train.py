"""`megatron-lpr train`: a layout of many ranks is checked on one machine."""

import pytest

from megatron_lpr import cli
from megatron_lpr.testing.toy_models import write_toy_project


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    path = str(write_toy_project(root)["stage1"])
    assert cli.main(["preprocess", path]) == 0
    return path


def train(recipe, *words):
    return cli.main(["train", recipe, "--set", "model.load=null", *map(str, words)])


def test_ranks_of_a_dry_run(recipe, capsys):
    two_experts = ["--set", "parallel.expert=2"]
    assert train(recipe, "--dry-run", *two_experts) == 2
    assert "the number of ranks, 1" in capsys.readouterr().err
    assert train(recipe, "--dry-run", "--ranks", 2, *two_experts) == 0
    assert "on 2 rank(s)" in capsys.readouterr().out


def test_a_dry_run_for_gpus_on_a_machine_without(recipe, capsys):
    layout = [
        "parallel.expert=2",
        "parallel.overlap_frozen=on",
        "parallel.frozen=replicated",
        "parallel.dispatcher=flex",
    ]
    words = [f"--set={override}" for override in (*layout, "fp8.recipe=tensorwise", "model.dtype=auto")]
    assert train(recipe, "--dry-run", "--ranks", 2, *words) == 0
    assert (
        "bfloat16 (model.dtype: auto), as on GPUs; a processor is measured where it trains" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "words, told",
    [
        (["--ranks", 2], "--ranks 2: only with --dry-run"),
        (["--ranks", 0, "--dry-run"], "--ranks 0: at least 1"),
        (["--ranks", 3, "--dry-run"], "train.global_batch_size"),
    ],
)
def test_ranks_that_cannot_be(recipe, capsys, words, told):
    assert train(recipe, *words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
