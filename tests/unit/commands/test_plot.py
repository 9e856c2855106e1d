"""`megatron-lpr plot`: what it draws of runs and of evaluation results, and what it refuses."""

import functools
import json
import xml.dom.minidom

import pytest
from logged_runs import log_run
from matplotlib.image import imread

from megatron_lpr import cli
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.reporting import gain_plot, plots


@pytest.fixture
def drawn(monkeypatch):
    """What was given to the functions that draw, which draw it."""
    seen = {}

    def record(name, draw, data, path, **more):
        seen[name] = (data, more)
        draw(data, path, **more)

    for module, name in (
        (plots, "plot_losses"), (plots, "plot_frozen_share"), (plots, "plot_routing"),
        (gain_plot, "plot_retention_against_gain"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, functools.partial(record, name, getattr(module, name)))
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
    scores = [
        CorpusScore(name=language, language=language, role=role, bits_per_byte=1.0, tokens=1, bytes=1)
        for language, role in (("hu", "expanded"), ("en", "original"))
    ]
    EvaluationResult(model=name, window=8, corpora=tuple(scores), routing=routing).save(file)
    return file


def plot(*words):
    return cli.main(["plot", *map(str, words)])


def test_runs_and_results_have_a_picture_each(tmp_path, drawn, capsys):
    runs = [run(tmp_path / name, name) for name in ("stage1", "stage2")]
    results = [result(tmp_path / f"{n}.json", f"stage {n}", {"hu": [0.1 * n, 0.2]}) for n in (1, 2)]
    out = tmp_path / "plots"
    assert plot(runs[0], results[0], runs[1], results[1], "--max-share", 0.5, "--out", out) == 0
    names = ("losses", "frozen_share", "routing")
    assert capsys.readouterr().out.split() == [str(out / f"{name}.png") for name in names]
    assert all(imread(file).ndim == 3 for file in out.iterdir())
    losses, _ = drawn["plot_losses"]
    assert {name: [point.value for point in log.curves["ntp_loss"][""].points()] for name, log in losses.items()} == {
        "stage1": [3.0, 2.0], "stage2": [3.0, 2.0],
    }  # fmt: skip
    shares, more = drawn["plot_frozen_share"]
    assert shares == {"stage 1": {"hu": [0.1, 0.2]}, "stage 2": {"hu": [0.2, 0.2]}} and more == {"max_share": 0.5}
    assert drawn["plot_routing"] == drawn["plot_frozen_share"]


def test_retention_against_gain_with_the_base(tmp_path, drawn, capsys):
    base, dense = (result(tmp_path / f"{name}.json", name, {}) for name in ("base", "dense"))
    review = result(tmp_path / "review.json", "review", {"hu": [0.5]})
    out = tmp_path / "plots"
    assert plot(dense, review, "--base", base, "--replayed", "en", "--out", out) == 0
    names = ("retention_against_gain", "frozen_share", "routing")
    assert capsys.readouterr().out.split() == [str(out / f"{name}.png") for name in names]
    arms, _ = drawn["plot_retention_against_gain"]
    assert [arm.name for arm in arms] == ["base", "dense", "review"]
    assert list(arms[0].kept) == ["replayed (en)"]
    assert drawn["plot_frozen_share"][0] == {"review": {"hu": [0.5]}}
    assert list(drawn["plot_routing"][0].items()) == [
        ("", {}),
        ("dense", {}),
        ("review", {"hu": [0.5]}),
    ]  # their colours
    assert plot(dense, "--base", base, "--out", tmp_path / "dense only") == 0
    assert [file.name for file in (tmp_path / "dense only").iterdir()] == ["retention_against_gain.png"]


def test_each_picture_of_a_report_by_itself(tmp_path, capsys):
    runs = [log_run(tmp_path / place, name) for place, name in (("a", "stage 1"), ("b", "stage 2 <b>"))]
    assert plot(*runs, "--svg", "--out", tmp_path / "plots") == 0
    files = [tmp_path / "plots" / line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    names = {file.stem for file in files}
    assert {"ntp_loss", "ntp_loss_hu", "retention_en", "stage_1_frozen_share_before", "stage_2_b__load_hu"} <= names
    assert sorted(files) == sorted((tmp_path / "plots").iterdir())
    for file in files:
        assert xml.dom.minidom.parse(str(file)).documentElement.tagName == "svg" and "<style>" in file.read_text()


def test_two_runs_of_one_name_go_by_their_folders(tmp_path, drawn):
    folders = [run(tmp_path / name, "stage 1") for name in ("a", "b")]
    assert plot(*folders, "--out", tmp_path / "plots") == 0
    assert list(drawn["plot_losses"][0]) == list(map(str, folders))
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["losses.png"]


def test_what_cannot_be_drawn(tmp_path, capsys):
    out = tmp_path / "plots"
    here, empty, dense = run(tmp_path / "run", "x"), tmp_path / "empty", result(tmp_path / "dense.json", "base", {})
    damaged = run(tmp_path / "damaged", [1])
    empty.mkdir()
    for words, told in (
        ([empty], f"metrics {empty}/metrics.jsonl: no such file; give the output folder of a run"),
        ([damaged], f"metrics {damaged}/metrics.jsonl: no line of 2 is a step's record; move the file away"),
        ([tmp_path / "none.json"], "evaluation result"),
        ([dense], f"{dense}: says nothing of routing"),
        ([dense, "--svg"], "--svg: has no effect without a run"),
        ([here, "--max-share", 0.5], "--max-share 0.5: has no effect"),
        ([here, "--base", dense], f"--base {dense}: has no effect"),
        ([dense, "--replayed", "en"], "--replayed en: has no effect without --base"),
        ([dense, "--base", dense, "--replayed", "fr"], "--replayed fr: the results have no original text in it"),
        ([dense, "--max-share", 2], "--max-share 2.0: a share, above 0 and at most 1"),
    ):
        assert plot(*words, "--out", out) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert plot(here, "--out", dense) == 2 and "is a file; name a folder" in capsys.readouterr().err
    assert not out.exists()
