"""Ranks divide the windows of a text: each scored token is computed once, all ranks do the same work."""

import dataclasses
import itertools

import pytest
import torch

from megatron_lpr.evaluation.windows import RankShare, Text, rounds
from megatron_lpr.recipe.text_settings import EvaluationCorpus

CORPUS = EvaluationCorpus(name="x", files=("x",), language="hu", role="expanded")


def text_of(length: int) -> Text:
    """Tokens are 1, 2, ...; of three labels two are scored."""
    stream = torch.arange(1, length + 1)
    return Text(corpus=CORPUS, stream=stream, scored=stream % 3 > 0, bytes=1)


def computed(text, window, batch, shares):
    """What all ranks compute together, as (token, label) pairs; and the shapes of each rank's forward passes."""
    pairs, scored, shapes = [], [], []
    for share in shares:
        mine = [batches for batches, _ in rounds(text, window, batch, share)]
        shapes.append([[b.tokens_BS.shape for b in micro_batches] for micro_batches in mine])
        for b in itertools.chain(*mine):
            assert not b.scored_BS[~b.is_text_BS].any()
            assert b.tokens_BS.shape == b.labels_BS.shape == b.scored_BS.shape
            pairs += zip(b.tokens_BS[b.is_text_BS].tolist(), b.labels_BS[b.is_text_BS].tolist(), strict=True)
            scored += b.labels_BS[b.scored_BS].tolist()
    return sorted(pairs), sorted(scored), shapes


@pytest.mark.parametrize("length", [2, 9, 41, 100, 101])
@pytest.mark.parametrize("window", [1, 8, 13, 1000])
@pytest.mark.parametrize(
    "layout",
    [{}, {"data_size": 3}, {"pipeline": 2}, {"data_size": 2, "pipeline": 2}, {"context_size": 2, "multiple": 8}],
    ids=str,
)
def test_every_window_once(length, window, layout):
    text, share = text_of(length), RankShare(**layout)
    ranks = itertools.product(range(share.data_size), range(share.context_size))
    shares = [dataclasses.replace(share, data_rank=d, context_rank=c) for d, c in ranks]
    for batch in (1, 3):
        pairs, scored, shapes = computed(text, window, batch, shares)
        assert pairs == [(token, token + 1) for token in range(1, length)]
        assert scored == text.stream[1:][text.scored[1:]].tolist()
        assert all(of_rank == shapes[0] for of_rank in shapes) and len(set(itertools.chain(*shapes[0]))) == 1
        for micro_batches in shapes[0]:
            assert len(micro_batches) == 1 or len(micro_batches) % share.pipeline == 0
            rows, positions = micro_batches[0]
            assert rows <= batch and positions * share.context_size % share.multiple == 0


def test_one_process_pads_less_than_a_row_for_each_pass():
    passes = [(b.tokens_BS.shape[0], done) for (b,), done in rounds(text_of(102), 10, 4, RankShare())]
    assert passes == [(4, 4), (4, 8), (4, 11)]  # 11 windows, the last of one token
    assert [b.tokens_BS.shape for (b,), _ in rounds(text_of(82), 10, 8, RankShare())] == [(5, 10), (5, 10)]


def test_a_pass_costs_what_its_windows_do_however_long_the_text_is(monkeypatch):
    made, ones, zeros = [], torch.ones, torch.zeros
    monkeypatch.setattr(torch, "ones", lambda n, **o: made.append(n) or ones(n, **o))
    monkeypatch.setattr(torch, "zeros", lambda n, **o: made.append(n) or zeros(n, **o))
    for windows in (10, 1000):
        corpus = EvaluationCorpus(name="x", language="x", role="original", files=("x",))
        stream = torch.arange(8 * windows + 1)
        text = Text(corpus=corpus, stream=stream, scored=stream > 0, bytes=1)
        made.clear()
        assert sum(1 for _ in rounds(text, 8, 2, RankShare())) == windows // 2
        assert max(made) == 16
