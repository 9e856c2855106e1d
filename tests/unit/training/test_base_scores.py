"""What the base scores on held-out text, kept in a run's folder: taken from there, or refused where it was edited."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.training import base_scores

SCORE = CorpusScore(name="hu", language="hu", role="expanded", bits_per_byte=1.5, tokens=9, bytes=9)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """recorded(corpora) -> what a run finds in its folder where that holds `corpora` for its own text."""
    monkeypatch.setattr(base_scores, "_key", lambda plan: "own")
    plan = SimpleNamespace(recipe=SimpleNamespace(output=str(tmp_path)), source=None)
    plan.held_out = (SimpleNamespace(corpus=SCORE),)

    def found(corpora, key="own"):
        (tmp_path / base_scores.FILE).write_text(json.dumps({"key": key, "corpora": corpora}))
        return base_scores.recorded(plan)

    return found


def test_they_come_back(recorded):
    assert recorded([dataclasses.asdict(SCORE)]) == (SCORE,)
    assert recorded("of another text", key="another") is None


@pytest.mark.parametrize(
    "corpora, told",
    [
        (None, "corpora: is empty"),
        ([5], r"corpora\[0\]: expected a mapping, found 5"),
        ([{"name": "hu"}], r"corpora\[0\]: missing key"),
        (
            [dataclasses.asdict(SCORE) | {"bits_per_byte": "x"}],
            r"corpora\[0\].bits_per_byte: expected float, found 'x'",
        ),
        ([], "corpora: does not have hu"),
    ],
)
def test_edited_ones_are_refused(recorded, corpora, told):
    with pytest.raises(
        UserError, match=rf"{base_scores.FILE}: {told}.*; delete the file, and the base is scored again"
    ):
        recorded(corpora)
