"""`megatron-lpr plot`: what it draws of runs and of evaluation results, and what it refuses."""

import functools
import json

import pytest
from matplotlib.image import imread

from megatron_lpr import cli
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.reporting import plots


@pytest.fixture
def drawn(monkeypatch):
    """What was given to the two functions that draw, which draw it."""
    seen = {}

    def record(name, draw, data, path, **more):
        seen[name] = (data, more)
        draw(data, path, **more)

    for name in ("plot_losses", "plot_frozen_share"):
        monkeypatch.setattr(plots, name, functools.partial(record, name, getattr(plots, name)))
    return seen


def run(folder, name, losses=(3.0, 2.0)):
    folder.mkdir()
    records = [
        {"step": step, "stage": name, "ntp_loss": loss, "balance_loss": None, "lpr_loss": None}
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def result(file, name, routing):
    score = CorpusScore(name="hu", language="hu", role="expanded", bits_per_byte=1.0, tokens=1, bytes=1)
    EvaluationResult(model=name, window=8, corpora=(score,), routing=routing).save(file)
    return file


def plot(*words):
    return cli.main(["plot", *map(str, words)])


def test_runs_and_results_have_a_picture_each(tmp_path, drawn, capsys):
    runs = [run(tmp_path / name, name) for name in ("stage1", "stage2")]
    results = [result(tmp_path / f"{n}.json", f"stage {n}", {"hu": [0.1 * n, 0.2]}) for n in (1, 2)]
    out = tmp_path / "plots"
    assert plot(runs[0], results[0], runs[1], results[1], "--max-share", 0.5, "--out", out) == 0
    assert capsys.readouterr().out.split() == [str(out / "losses.png"), str(out / "frozen_share.png")]
    assert all(imread(file).ndim == 3 for file in out.iterdir())
    losses, _ = drawn["plot_losses"]
    assert {name: [r["ntp_loss"] for r in records] for name, records in losses.items()} == {
        "stage1": [3.0, 2.0], "stage2": [3.0, 2.0],
    }  # fmt: skip
    shares, more = drawn["plot_frozen_share"]
    assert shares == {"stage 1": {"hu": [0.1, 0.2]}, "stage 2": {"hu": [0.2, 0.2]}} and more == {"max_share": 0.5}


def test_two_runs_of_one_name_go_by_their_folders(tmp_path, drawn):
    folders = [run(tmp_path / name, "stage 1") for name in ("a", "b")]
    assert plot(*folders, "--out", tmp_path / "plots") == 0
    assert list(drawn["plot_losses"][0]) == list(map(str, folders))
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["losses.png"]


def test_what_cannot_be_drawn(tmp_path, capsys):
    out = tmp_path / "plots"
    here, empty, dense = run(tmp_path / "run", "x"), tmp_path / "empty", result(tmp_path / "dense.json", "base", {})
    empty.mkdir()
    for words, told in (
        ([empty], f"metrics {empty}/metrics.jsonl: no such file"),
        ([tmp_path / "none.json"], "evaluation result"),
        ([dense], f"{dense}: says nothing of routing"),
        ([here, "--max-share", 0.5], "--max-share 0.5: has no effect"),
        ([dense, "--max-share", 2], "--max-share 2.0: a share, above 0 and at most 1"),
    ):
        assert plot(*words, "--out", out) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert plot(here, "--out", dense) == 2 and "is a file; name a folder" in capsys.readouterr().err
    assert not out.exists()
