"""Gain and retention of evaluation results, as points of a picture."""

import dataclasses

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.gain import arms, gain_table
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult

TEXTS = [
    ("hu help", "hu", "expanded"),
    ("hu guide", "hu", "expanded"),
    ("en", "en", "original"),
    ("es", "es", "original"),
]


def result(model, *bits):
    scores = [
        CorpusScore(name=name, language=language, role=role, bits_per_byte=bit, tokens=10, bytes=100)
        for (name, language, role), bit in zip(TEXTS, bits, strict=True)
    ]
    return EvaluationResult(model=model, window=8, corpora=tuple(scores))


BASE, REVIEW = result("base", 2.0, 4.0, 1.0, 2.0), result("review", 1.0, 3.0, 1.25, 1.6)


def test_gain_is_the_mean_over_texts_and_the_base_has_none():
    base, review = arms([BASE, REVIEW], replayed=["en"])
    assert (base.name, base.gain) == ("base", 0)
    assert base.kept == {"replayed (en)": {"en": 100}, "never replayed (es)": {"es": 100}}
    assert (review.name, review.gain) == ("review", pytest.approx((50 + 25) / 2))
    assert review.kept == {"replayed (en)": {"en": 80}, "never replayed (es)": {"es": pytest.approx(125)}}


def test_without_replayed_languages_there_is_one_series():
    base, review = arms([BASE, REVIEW], curve="gamma")
    assert review.kept == {"original languages (en, es)": {"en": 80, "es": pytest.approx(125)}}
    assert (base.curve, review.curve) == (None, "gamma")


def test_the_table_has_a_column_per_model_and_the_means_of_the_picture():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in gain_table([BASE, REVIEW], replayed=["en"]).splitlines()
    ]
    assert rows[0] == ["held-out text", "role", "base", "review"]
    assert rows[2:9] == [
        ["hu help", "expanded", "2.000", "1.000 (-50.0%)"],
        ["hu guide", "expanded", "4.000", "3.000 (-25.0%)"],
        ["en", "replayed", "1.000", "1.250 (80.0%)"],
        ["es", "never replayed", "2.000", "1.600 (125.0%)"],
        ["**mean gain**", "expanded", "", "**37.5%**"],
        ["**mean kept**", "replayed (en)", "", "**80.0%**"],
        ["**mean kept**", "never replayed (es)", "", "**125.0%**"],
    ]


def test_what_cannot_be_compared():
    with pytest.raises(UserError, match="--replayed fr: the results have no original text in it; they have en, es"):
        arms([BASE, REVIEW], replayed=["fr"])
    with pytest.raises(UserError, match="same text and window"):
        arms([BASE, dataclasses.replace(REVIEW, window=9)])
    for kept, missing in ((slice(0, 2), "original"), (slice(2, 4), "expanded")):
        some = [dataclasses.replace(r, corpora=r.corpora[kept]) for r in (BASE, REVIEW)]
        with pytest.raises(UserError, match=f"the results of base have no text in an {missing} language"):
            arms(some)
