"""Retention, and the table of several models."""

import dataclasses
import re

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult, bits_per_language, markdown, retention, retention_table


def result(model, hungarian, handbook, news, spanish, *, window=256):
    rows = [
        ("help", "hu", "expanded", hungarian, 1000),
        ("handbook", "en", "original", handbook, 3000),
        ("news", "en", "original", news, 1000),
        ("handbook", "es", "original", spanish, 500),
    ]
    scores = tuple(
        CorpusScore(name=name, language=language, role=role, bits_per_byte=bits, tokens=7, bytes=size)
        for name, language, role, bits, size in rows
    )
    return EvaluationResult(model=model, window=window, corpora=scores)


BASE = result("base", 3.0, 1.0, 2.0, 1.5)
STAGE_1 = result("stage 1", 2.0, 1.25, 2.5, 3.0)
STAGE_2 = result("stage 2", 2.125, 1.0, 1.0, 1.5)


def test_retention_pools_the_bytes_of_a_language():
    # en: base (3000 * 1 + 1000 * 2) = 5000 bits; stage 1: 6250; stage 2: 4000.
    assert retention(BASE, STAGE_1) == pytest.approx({"en": 80.0, "es": 50.0})
    assert retention(BASE, STAGE_2) == pytest.approx({"en": 125.0, "es": 100.0})


def test_bits_of_a_language_are_of_all_its_bytes():
    assert bits_per_language(BASE.corpora) == {"hu": 3.0, "en": 1.25, "es": 1.5}


def test_table():
    table = retention_table([BASE, STAGE_1, STAGE_2])
    grid, _, footer = table.partition("\n\n")
    lines = grid.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.fullmatch(r"(\| -+:? )+\|", lines[1])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "held-out text",
        "language",
        "role",
        "base",
        "stage 1",
        "stage 2",
        "stage 1 vs base",
        "stage 2 vs base",
    ]
    assert cells[2:] == [
        ["help", "hu", "expanded", "3.000", "2.000", "2.125", "-1.000", "-0.875"],
        ["handbook", "en", "original", "1.000", "1.250", "1.000", "80.0% kept", "100.0% kept"],
        ["news", "en", "original", "2.000", "2.500", "1.000", "80.0% kept", "200.0% kept"],
        ["handbook", "es", "original", "1.500", "3.000", "1.500", "50.0% kept", "100.0% kept"],
    ]
    assert "stage 1: en 80.0%, es 50.0%; stage 2: en 125.0%, es 100.0%." in footer


def test_names_tell_a_terminal_nothing():
    table = markdown([["text", "model"], ["\x1b[2J", "\x9b1m"]], left_columns=1)
    assert "\x1b" not in table and "\x9b" not in table and "\ufffd[2J" in table


def test_documents_that_open_otherwise_are_not_compared():
    same, old = dataclasses.replace(BASE, tokenizer="a", bos_id=1), BASE  # from before it was recorded
    for other in (old, *(dataclasses.replace(STAGE_1, tokenizer="a", bos_id=bos) for bos in (None, 2))):
        with pytest.raises(UserError, match="open alike .BOS token 1 and .*: evaluate both with the same"):
            retention_table([same, other])
    retention_table([same, dataclasses.replace(STAGE_1, tokenizer="a", bos_id=1)])
    retention_table([same, dataclasses.replace(STAGE_1, tokenizer="b")])  # each model in its own way


def test_control_tokens_that_are_read_otherwise_are_not_compared():
    kept = dataclasses.replace(BASE, tokenizer="a", parse_special_tokens=False)
    with pytest.raises(UserError, match="read alike .*: evaluate both with the same preprocess.parse_special_tokens"):
        retention_table([kept, dataclasses.replace(STAGE_1, tokenizer="a", parse_special_tokens=True)])
    for other in (False, None):  # None: from before it was recorded
        retention_table([kept, dataclasses.replace(STAGE_1, tokenizer="a", parse_special_tokens=other)])


def test_table_of_the_base_alone():
    assert "kept" not in retention_table([BASE])


@pytest.mark.parametrize(
    "other",
    [
        result("other", 2.0, 1.0, 1.0, 1.0, window=512),
        dataclasses.replace(STAGE_1, corpora=STAGE_1.corpora[:2]),
        dataclasses.replace(STAGE_1, corpora=(dataclasses.replace(STAGE_1.corpora[0], bytes=1), *STAGE_1.corpora[1:])),
    ],
)
def test_results_on_other_text_are_not_compared(other):
    for compare in (lambda: retention(BASE, other), lambda: retention_table([BASE, other])):
        with pytest.raises(UserError, match="not from the same text"):
            compare()


def test_no_results_are_refused():
    with pytest.raises(UserError, match="no evaluation results"):
        retention_table([])


def test_json_round_trip(tmp_path):
    path = tmp_path / "base.json"
    result = dataclasses.replace(BASE, tokenizer="a", bos_id=1, parse_special_tokens=True)
    for routing in ({"help": [0.25, 0.5]}, {}):  # the second one leaves nothing of the first one's behind
        result = dataclasses.replace(result, routing=routing)
        result.save(path)
        assert EvaluationResult.load(path) == result
        assert (tmp_path / "base.routing.json").exists() == bool(routing)
    assert str(result).startswith("base: help 3.000, handbook 1.000, ") and str(result).endswith(" bits per byte")


@pytest.mark.parametrize("content", [None, "nonsense", "[]", '{"model": "m", "window": 1}', '{"corpora": [{}]}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="evaluation result .*result.json"):
        EvaluationResult.load(path)
