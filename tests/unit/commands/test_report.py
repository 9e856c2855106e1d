"""`megatron-lpr report`: what is on the page, and what is refused."""

import html
import json
import re
import xml.dom.minidom
from types import SimpleNamespace

import numpy as np
import pytest
from logged_runs import log_run
from manifest_entries import entry, tokenizer_record

from megatron_lpr import cli
from megatron_lpr.data.corpus.indexed import IndexedWriter
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.reporting.heat_map import heat_map
from megatron_lpr.reporting.line_chart import line_chart
from megatron_lpr.reporting.run_log import Curve
from megatron_lpr.reporting.svg import tick_label, ticks
from megatron_lpr.training import run_report

HOSTILE = '<script>alert("1")</script> & \x00\ud800'


def report(*words):
    return cli.main(["report", *map(str, words)])


def text_of(page):
    """What a reader sees, and what the pointer finds."""
    return " ".join(re.sub("<style>.*?</style>|<[^>]+>", " ", page, flags=re.S).split())


def result(file, model, bits, routing=None):
    score = CorpusScore(name="wiki", language="en", role="original", bits_per_byte=bits, tokens=9, bytes=9)
    EvaluationResult(model=model, window=8, corpora=(score,), routing=routing or {}).save(file)
    return file


def test_a_run(tmp_path, capsys):
    run = log_run(tmp_path / "run", "stage 2")
    assert report(run) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    page = (run / "report.html").read_text()
    text = text_of(page)
    for told in (
        "state finished", "step 30 of 30 (100%)", "tokens read 1,920", "Next-token prediction, by language",
        "language step 10 step 30 kept", "en 1.", "99.0", "before: step 1", "after: step 30", "expert 0 (frozen)",
        "mixture expanded 75%, original 25%", "replayed so far 960 tokens of original languages, 50% of what",
        "manifest data/manifest.yaml (cannot be read here", "layout tensor 2, data 4", "python 3.11.7",
        "step 30 hu: ",
    ):  # fmt: skip
        assert told in text, told
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


def test_mixtures_are_told_as_they_are_read():
    """Shares sum to one, whatever the recipe's do, and an entry of the schedule is what it says and data.mixture."""
    schedule = [
        {"from_sample": 0, "weights": {"news": 0.0}},
        {"from_sample": 400, "mixture": {"expanded": 1.0, "original": 1.0}},
        {"from_sample": 1000, "weights": {}},
    ]
    data = {"mixture": {"expanded": 3.0, "original": 1.0}, "schedule": schedule}
    run = SimpleNamespace(section={"data": data}.get)
    assert list(run_report.mixture(run)) == [
        "from sample 0: expanded 75%, original 25%; weights news 0",
        "from sample 400: expanded 50%, original 50%",
        "from sample 1,000: expanded 75%, original 25%",
    ]


def test_it_needs_nothing_beside_it_and_its_pictures_are_xml(tmp_path):
    report(log_run(tmp_path / "run", "stage 2"), "--out", tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    assert not re.search(r"<script|<link|<img|src=|url\(|@import", page)
    assert {link[:2] for link in re.findall('href="(..)', page)} == {"#s"}
    pictures = re.findall("<figure>(.*?)</figure>", page, flags=re.S)
    assert len(pictures) > 10 and all(xml.dom.minidom.parseString(picture) for picture in pictures)


def test_names_are_shown_and_do_nothing(tmp_path):
    run = log_run(tmp_path / "run", HOSTILE, languages=("hu", '"><b>'))
    assert report(run) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp;" in page and "&quot;&gt;&lt;b&gt;" in page


def test_two_runs_and_what_differs(tmp_path):
    one = log_run(tmp_path / "a", "one", lr=0.001)
    two = log_run(tmp_path / "b", "two", steps=20, languages=("hu", "el"), lr=0.002, weight_decay=0.0)
    assert report(one, two, one) == 0
    text = html.unescape(text_of((one / "report.html").read_text()))
    assert "one, two Written" in text and "folder " + f"{one} {two} " in text
    settings = text.split(" Settings ")[2].split("All settings of one")[0]
    assert (
        settings.split()
        == (
            "one two train.steps 30 20 optimizer.lr 0.001 0.002 "
            "evaluation.corpora.en.language en – evaluation.corpora.en.role original – "
            'evaluation.corpora.en.files ["en"] – '
            "evaluation.corpora.el.language – el evaluation.corpora.el.role – original "
            'evaluation.corpora.el.files – ["el"]'
        ).split()
    )
    assert "step 20 one: " in text and "Next-token prediction: el" in text


def test_two_of_one_name_go_by_their_folders(tmp_path):
    runs = [log_run(tmp_path / name, "stage 1") for name in ("a", "b")]
    assert report(*runs) == 0
    assert f"<title>{runs[0]}, {runs[1]}</title>" in (runs[0] / "report.html").read_text()


def test_of_many_languages_those_have_pictures_of_which_most_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_lpr.reporting.pictures.MOST_LANGUAGES", 4)
    languages = [f"l{number}" for number in range(9)]
    runs = [log_run(tmp_path / name, name, languages=languages) for name in "ab"]
    for run in runs:
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text.replace('"l8": 960,', '"l8": 999,').replace('"l8": 960}', '"l8": 999}'))
    assert report(*runs) == report(runs[1]) == 0
    both, one = (html.unescape(text_of((run / "report.html").read_text())) for run in runs)
    for page, of_load in ((both, {"l8", "l0"}), (one, {"l8", "l0", "l1", "l2"})):
        assert "Of 9 languages those 4 have pictures of their own here of which most was read" in page
        assert set(re.findall(r"(l\d): step 30 expert", page)) == of_load
    assert set(re.findall("Next-token prediction: (l.)", both)) == {"l8", "l0", "l1", "l2"}
    assert "Next-token prediction, by language" in one and "step 30 l0: " in one and "l7: " in one


def test_the_page_does_not_grow_with_points_and_rows_that_nobody_can_see():
    def size(lines, steps):
        curves = {f"run {number}": Curve() for number in range(lines)}
        for curve in curves.values():
            for step in range(steps):
                curve.add(step, float(step % 7))
        return len(line_chart("", "", curves)) / lines

    assert size(64, 300) < 0.4 * size(8, 300)
    told = [
        heat_map("", {f"expert {row}": [row / rows] * 2 for row in range(rows)}, top=1.0, columns=[0, 1]).count("%")
        for rows in (41, 256)
    ]
    assert told[0] == told[1]


def test_runs_of_one_manifest_read_it_once(tmp_path, monkeypatch):
    runs = [log_run(tmp_path / name, name) for name in "abc"]
    (tmp_path / "data").mkdir()
    corpora = (entry("hu", tokens=9),)
    Manifest(path=str(tmp_path / "data/manifest.yaml"), tokenizer=tokenizer_record(9), corpora=corpora).save()
    monkeypatch.chdir(tmp_path)
    loaded, load = [], Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda *a, **o: loaded.append(a) or load(*a, **o))
    assert report(*runs) == 0 and len(loaded) == 1


def test_of_thousands_of_corpora_the_largest_are_in_the_table(monkeypatch):
    monkeypatch.setattr(run_report, "_MOST_CORPORA", 2)
    sizes = [5, 7, 1, 9]
    corpora = tuple(entry(f"c{n}", language="hu", tokens=n) for n in sizes)
    manifest = Manifest(path="m", tokenizer=tokenizer_record(9), corpora=corpora)
    run = SimpleNamespace(manifest=manifest, epochs={})
    assert [row[0] for row in run_report.corpora_rows(run)] == ["corpus", "c7", "c9", "and 2 smaller ones"]


def test_results_of_evaluate(tmp_path):
    run = log_run(tmp_path / "run", "stage 2")
    results = [result(tmp_path / "base.json", "base", 1.0), result(tmp_path / "it.json", "it", 1.25, {"wiki": [0.5]})]
    assert report(run, *results) == 0
    text = text_of((run / "report.html").read_text())
    assert "wiki en original 1.000 1.250 80.0% kept" in text and "it: held-out text wiki 0 layer 50 0% 50%" in text


def test_a_run_that_is_still_writing(tmp_path):
    run = log_run(tmp_path / "run", "stage 2")
    (run / "ends.jsonl").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "ntp_lo')
    assert report(run) == 0 and "step 30 of 30" in text_of((run / "report.html").read_text())


def test_damaged_lines_are_left_out_and_the_page_says_so(tmp_path, capsys):
    run = log_run(tmp_path / "run", "stage 2")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    string = json.dumps(json.loads(lines[8]) | {"lr": "0.001"}) + "\n"
    (run / "metrics.jsonl").write_text(
        "".join([*lines[:6], "}{\n", "[1]\n", *lines[6:8], string, *lines[9:], lines[9]])
    )
    assert report(run) == 0
    told = (
        "lines left out: 3, no steps' records, from line 7 on; lines whose step does not come after the one before: 1, "
        "from line 33 on"
    )
    assert f" log {told}" in html.unescape(text_of((run / "report.html").read_text()))
    assert told in capsys.readouterr().err


def test_how_often_each_corpus_is_passed_over(tmp_path, monkeypatch):
    """30 steps of 4 samples, three quarters of them hu, of corpora that fill ten windows; half of them are made."""
    run = log_run(tmp_path / "run", "stage 2")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:15]))
    (tmp_path / "data").mkdir()
    corpora = []
    for name, role in (("hu", "expanded"), ("en", "original")):
        with IndexedWriter(str(tmp_path / "data" / name), 100) as writer:
            writer.add_documents(np.ones(161, writer.dtype), np.array([161], np.int32))
        prefix = str(tmp_path / "data" / name)
        corpora.append(entry(f"{name} web", role, prefix=prefix, language=name, tokens=161))
    tokenizer = tokenizer_record(100)
    Manifest(path=str(tmp_path / "data/manifest.yaml"), tokenizer=tokenizer, corpora=tuple(corpora)).save()
    monkeypatch.chdir(tmp_path)
    assert report(run) == 0
    text = text_of((run / "report.html").read_text())
    assert "documents tokens epochs so far of the whole run hu web hu expanded 1 1 161 4.500 9.000 en web" in text
    assert "en web en original 1 1 161 1.500 3.000" in text
    (tmp_path / "data/en.idx").unlink()  # as where a report is written on another machine than the corpora are on
    assert report(run) == 0
    assert "en web en original 1 1 161 1.500 3.000" in text_of((run / "report.html").read_text())
    manifest = tmp_path / "data/manifest.yaml"
    manifest.write_text(manifest.read_text().replace("tokens: 161", "tokens: 1"))
    assert report(run) == 0
    text = text_of((run / "report.html").read_text())
    assert "epochs cannot be told here: " in text and "documents tokens hu web hu expanded 1 1 1 en web" in text


def test_a_dense_run_and_one_of_an_old_version(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    records = [
        {"step": step, "stage": "old", "ntp_loss": 1.0, "balance_loss": None, "lpr_loss": None} for step in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report(run) == 0
    text = text_of((run / "report.html").read_text())
    assert "Next-token prediction" in text and "Routing" not in text


def test_what_is_refused(tmp_path, capsys):
    run, empty, young = log_run(tmp_path / "run", "x"), tmp_path / "empty", log_run(tmp_path / "young", "y")
    empty.mkdir()
    (young / "metrics.jsonl").unlink()
    damaged = log_run(tmp_path / "damaged", "z")
    (damaged / "metrics.jsonl").write_bytes(b"\xff\x00\n")
    file = result(tmp_path / "base.json", "base", 1.0)
    (tmp_path / "other.json").write_text("{}")
    for words, told in (
        ([tmp_path / "none"], f"run {tmp_path}/none: no such folder"),
        ([empty], f"run {empty}: no training run there"),
        ([young], f"run {young}: no metrics yet (no metrics.jsonl)"),
        ([damaged], f"metrics {damaged}/metrics.jsonl: no line of 1 is a step's record; move the file away"),
        ([file], "report: no run is named, only results"),
        ([run, tmp_path / "other.json"], "other.json: not written by `megatron-lpr evaluate`"),
        ([run, "--out", tmp_path], f"--out {tmp_path}: is a folder; name a file, as {tmp_path}/report.html"),
        ([run, "--out", run / "metrics.jsonl"], "is no name of a page; let it end in .html"),
        ([run, "--out", file / "x.html"], f"--out {file}/x.html: cannot be written in {file}"),
    ):
        assert report(*words) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, error
    assert not list(tmp_path.rglob("*.html*"))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [0.1234567890123, 1.0, 2.5e-5, 4e17])
def test_a_long_flat_curve_is_flat(value, log):
    """The means of many equal numbers are not quite equal."""
    curve = Curve()
    for step in range(1, 2001):
        curve.add(step, value * (1 + step % 7 * 1e-16))
    picture = xml.dom.minidom.parseString(line_chart("lr", "", {"run": curve}, log=log))
    labels = [
        text.firstChild.data for text in picture.getElementsByTagName("text") if "end" in text.getAttribute("class")
    ]
    assert len(labels) == len(set(labels)) > 2


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (0, 50_000, "0 10k 20k 30k 40k 50k"),
        (1.012, 1.021, "1.012 1.014 1.016 1.018 1.020"),
        (1, 12, "2.5 5.0 7.5 10.0"),
        (0, 5e-5, "0 1e-05 2e-05 3e-05 4e-05 5e-05"),
        (980, 1030, "980 990 1,000 1,010 1,020 1,030"),
    ],
)
def test_axes_have_round_numbers(low, high, labels):
    values = ticks(low, high)
    assert " ".join(tick_label(value, values[1] - values[0], values[-1]) for value in values) == labels
