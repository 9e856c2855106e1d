"""Files of a run that somebody has edited: `report`, `status`, `plot`, `compare` show the rest, or say what to do."""

import html
import json

import pytest
import yaml
from edited import changed
from logged_runs import log_run

from megatron_lpr import cli
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.evaluation.tasks import TaskResult, TaskScore

LINES = {"starts.jsonl", "ends.jsonl"}


@pytest.mark.parametrize(
    "file, setting, value, told",
    [
        ("recipe.yaml", "data", [1], "recipe.yaml: data: expected a mapping, found [1]"),
        ("recipe.yaml", "data.mixture", "much", "recipe.yaml: data.mixture: expected a mapping, found 'much'"),
        ("recipe.yaml", "data.mixture.expanded", [1], "data.mixture.expanded: expected float, found [1]"),
        ("recipe.yaml", "data.schedule", [{"mixture": {}}], "data.schedule[0]: missing key 'from_sample'"),
        ("recipe.yaml", "data.replay", {"documents": 5}, "data.replay.documents: expected a mapping, found 5"),
        ("recipe.yaml", "data.seq_length", float("nan"), "data.seq_length: expected int, found nan"),
        ("recipe.yaml", "train.steps", -3, "train.steps: -3; at least 1"),
        ("recipe.yaml", "model.num_frozen_experts", 0, "model.num_frozen_experts: 0; at least 1"),
        ("recipe.yaml", "parallel.tensor", {"a": None}, "parallel.tensor: expected int, found {'a': None}"),
        ("recipe.yaml", "evaluation.corpora", 7, "evaluation.corpora[0]: expected a mapping, found 7"),
        ("recipe.yaml", "of_another_version", [{}], None),
        ("recipe.yaml", "model.dtype", None, None),
        ("starts.jsonl", "hosts", {"n": 1}, "starts.jsonl: hosts[0]: expected str, found {'n': 1}"),
        ("starts.jsonl", "world_size", "eight", "starts.jsonl: world_size: expected int, found 'eight'"),
        ("starts.jsonl", "step", [1], "starts.jsonl: step: expected int, found [1]"),
        ("starts.jsonl", "versions", ..., None),
        ("ends.jsonl", "outcome", "\ud800", "ends.jsonl: outcome: unknown value '?'"),
        ("ends.jsonl", "time", 5, None),
    ],
)
def test_what_is_wrong_is_left_out_and_said(tmp_path, capsys, file, setting, value, told):
    run, other = log_run(tmp_path / "run", "stage 2"), log_run(tmp_path / "other", "x")
    tree = yaml.safe_load((run / file).read_text())
    changed(tree, setting, value)
    (run / file).write_text(json.dumps(tree) + "\n" if file in LINES else yaml.safe_dump(tree))
    assert cli.main(["report", str(run), str(other)]) == cli.main(["status", str(run)]) == 0
    page, status = html.unescape((run / "report.html").read_text()), capsys.readouterr().out
    assert ("left out" in status) == ("<th>left out</th>" in page) == bool(told)
    assert not told or (told in page and told in status)
    assert cli.main(["plot", "--svg", str(run), "--out", str(tmp_path / "plots")]) == 0


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", None),
        (b"[1, 2]", "recipe.yaml: expected a mapping, found [1, 2]"),
        (b"2026-01-01: [{2026-01-01: 1}]", None),
        (b"name: \xff", "recipe.yaml: not UTF-8 text (byte 6, about line 1)"),
        (b"&a {name: x, data: *a}", "recipe.yaml: not valid YAML: found unconstructable recursive node"),
        (None, "recipe.yaml: cannot be read: Is a directory"),
    ],
)
def test_a_recipe_that_is_none(tmp_path, capsys, content, told):
    run, other = log_run(tmp_path / "run", "stage 2"), log_run(tmp_path / "other", "x")
    (run / "recipe.yaml").unlink()
    if content is None:
        (run / "recipe.yaml").mkdir()
    else:
        (run / "recipe.yaml").write_bytes(content)
    status, page = cli.main(["status", str(run)]), cli.main(["report", str(run), str(other)])
    out, error = capsys.readouterr()
    assert status == page == (2 if told and "expected" not in told else 0)
    assert (told or "") in out + error


def score(name, role, bits):
    return CorpusScore(name=name, language=name, role=role, bits_per_byte=bits, tokens=9, bytes=9)


RESULT = EvaluationResult(
    model="it",
    window=8,
    corpora=(score("hu", "expanded", 1.0), score("en", "original", 1.0)),
    routing={"hu": [0.5], "en": [0.5]},
)
TASKS = TaskResult(
    model="it",
    tasks=(TaskScore(benchmark="b", language="en", role="original", name="t", metric="acc", shots=0, score=0.5),),
    bos=True,
)


@pytest.mark.parametrize(
    "setting, value, told",
    [
        ("model", ["it"], "model: expected str, found ['it']"),
        ("window", ..., "missing key 'window'"),
        ("parse_special_tokens", {}, "parse_special_tokens: expected bool, found {}"),
        ("corpora.0.bits_per_byte", float("nan"), "corpora[0].bits_per_byte: expected float, found nan"),
        ("corpora.1.bits_per_byte", 0, "corpora[1].bits_per_byte: 0.0; above 0"),
        ("corpora.1.bytes", -3, "corpora[1].bytes: -3; at least 1"),
        ("corpora.1", None, "corpora[1]: is empty (null)"),
    ],
)
def test_results(tmp_path, capsys, setting, value, told):
    run, good, file = log_run(tmp_path / "run", "stage 2"), tmp_path / "base.json", tmp_path / "it.json"
    RESULT.save(good)
    RESULT.save(file)
    tree = json.loads(file.read_text())
    changed(tree, setting, value)
    file.write_text(json.dumps(tree))
    for words in (["report", run], ["compare"], ["plot", "--out", tmp_path / "p", "--base"]):
        assert cli.main([*map(str, words), str(good), str(file)]) == 2
        error = capsys.readouterr().err
        assert f"evaluation result {file}: not written by `megatron-lpr evaluate` ({told}" in error
        assert error.endswith("); evaluate again\n") and error.count("\n") == 1


def test_a_result_that_another_version_wrote_with_a_model_nobody_can_print(tmp_path, capsys):
    file = tmp_path / "it.json"
    RESULT.save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": "\ud800", "more": 1}))
    assert cli.main(["plot", str(file), "--base", str(file), "--out", str(tmp_path / "p")]) == 0
    assert EvaluationResult.load(file).model == "?"


@pytest.mark.parametrize(
    "content, told",
    [
        ("[]", "not written by `megatron-lpr evaluate` (no mapping); evaluate again"),
        ('{"hu": ["x"]}', "(routing.hu[0]: expected float, found 'x'); evaluate again"),
        ('{"hu": null}', "(routing.hu: is empty (null)"),
        ('{"hu": []}', "has no layers of hu; evaluate again"),
        ("[" * 100_000, "not written by `megatron-lpr evaluate` (maximum recursion depth"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_routing(tmp_path, capsys, content, told):
    file, routing = tmp_path / "it.json", tmp_path / "it.routing.json"
    RESULT.save(file)
    routing.unlink()
    if content is None:
        routing.mkdir()
    else:
        routing.write_text(content)
    assert cli.main(["plot", str(file), "--out", str(tmp_path / "p")]) == 2
    error = capsys.readouterr().err
    assert f"evaluation result {routing}: " in error and told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "setting, value, told",
    [
        ("model", None, "missing key 'model'"),
        ("tasks", [7], "tasks[0]: expected a mapping, found 7"),
        ("tasks.0.score", "x", "tasks[0].score: expected float, found 'x'"),
        ("tasks.0.benchmark", [1], "tasks[0].benchmark: expected str, found [1]"),
    ],
)
def test_results_of_tasks(tmp_path, capsys, setting, value, told):
    file = tmp_path / "it.json"
    TASKS.save(file)
    tree = json.loads(file.read_text())
    changed(tree, setting, value)
    file.write_text(json.dumps(tree))
    assert cli.main(["compare", str(file)]) == 2
    assert f"{file}: not written by `megatron-lpr evaluate --tasks` ({told}" in capsys.readouterr().err
    file.write_text("[" * 100_000)
    assert cli.main(["compare", str(file)]) == 2
