"""Ranks divide the windows of all texts: each scored token is computed once, all ranks do the same work."""

import dataclasses
import itertools
import tracemalloc

import pytest
import torch

from megatron_lpr.evaluation.windows import RankShare, Text, rounds, windows_in_all
from megatron_lpr.recipe.text_settings import EvaluationCorpus

CORPUS = EvaluationCorpus(name="x", files=("x",), language="hu", role="expanded")


def texts_of(*lengths: int) -> list[Text]:
    """Tokens are 1, 2, ... in the first text, 1001, 1002, ... in the second; of three labels two are scored."""
    streams = [torch.arange(1, length + 1) + 1000 * number for number, length in enumerate(lengths)]
    return [Text(corpus=CORPUS, stream=stream, scored=stream % 3 > 0, bytes=1) for stream in streams]


def computed(texts, window, batch, shares):
    """What all ranks compute together, as (text, token, label); and the shapes of each rank's forward passes."""
    triples, scored, shapes = [], [], []
    for share in shares:
        mine = [batches for batches, _ in rounds(texts, window, batch, share)]
        shapes.append([[b.tokens_BS.shape for b in micro_batches] for micro_batches in mine])
        for b in itertools.chain(*mine):
            assert not b.scored_BS[~b.is_text_BS].any()
            assert b.tokens_BS.shape == b.labels_BS.shape == b.scored_BS.shape
            assert torch.equal(b.tags_BS > 0, b.is_text_BS)
            columns = (b.tags_BS - 1, b.tokens_BS, b.labels_BS)
            triples += zip(*(column[b.is_text_BS].tolist() for column in columns), strict=True)
            scored += b.labels_BS[b.scored_BS].tolist()
    return sorted(triples), sorted(scored), shapes


# a text of one token, ones that are shorter than a window, that fill windows, that leave some of one
@pytest.mark.parametrize("lengths", [[2], [9], [41], [100], [101], [2, 9, 41, 101, 9], [3] * 40], ids=str)
@pytest.mark.parametrize("window", [1, 8, 13, 1000])
@pytest.mark.parametrize(
    "layout",
    [{}, {"data_size": 3}, {"pipeline": 2}, {"data_size": 2, "pipeline": 2}, {"context_size": 2, "multiple": 8}],
    ids=str,
)
def test_every_window_once(lengths, window, layout):
    texts, share = texts_of(*lengths), RankShare(**layout)
    ranks = itertools.product(range(share.data_size), range(share.context_size))
    shares = [dataclasses.replace(share, data_rank=d, context_rank=c) for d, c in ranks]
    for batch in (1, 3):
        triples, scored, shapes = computed(texts, window, batch, shares)
        assert triples == [(n, token, token + 1) for n, text in enumerate(texts) for token in text.stream[:-1].tolist()]
        assert scored == torch.cat([text.stream[1:][text.scored[1:]] for text in texts]).tolist()
        assert all(of_rank == shapes[0] for of_rank in shapes)
        for micro_batches in shapes[0]:
            assert len(set(micro_batches)) == 1 and len(micro_batches) % share.pipeline == 0
            rows, positions = micro_batches[0]
            assert rows <= batch and positions * share.context_size % share.multiple == 0
        everything = sum(len(micro_batches) * micro_batches[0][0] for micro_batches in shapes[0]) * share.data_size
        spare = share.data_size * share.pipeline * 4
        assert windows_in_all(texts, window) <= everything < windows_in_all(texts, window) + spare


def passes(texts, window, batch, **share):
    return [(tuple(b[0].tokens_BS.shape), done) for b, done in rounds(texts, window, batch, RankShare(**share))]


def test_no_pass_is_larger_than_what_is_left():
    assert passes(texts_of(110), 10, 4) == [((4, 10), 4), ((4, 10), 8), ((3, 10), 11)]  # the last window has 9
    assert passes(texts_of(102), 10, 4) == [((4, 10), 4), ((4, 10), 8), ((2, 10), 10), ((1, 1), 11)]


def test_windows_of_all_texts_share_passes_and_the_short_ones_come_together():
    # two windows and a short one of each text; three texts are shorter than a window
    texts = texts_of(24, 4, 29, 5, 26, 4)
    assert passes(texts, 10, 4) == [((4, 10), 4), ((3, 10), 7), ((2, 5), 9), ((3, 3), 12)]
    of_texts = [b.text_B.tolist() for (b,), _ in rounds(texts, 10, 4, RankShare())]
    assert of_texts == [[0, 0, 2, 2], [4, 4, 2], [4, 3], [0, 1, 5]]


def test_a_row_without_a_window_of_about_the_length_of_its_pass_takes_a_shorter_one():
    assert passes(texts_of(31, 4), 10, 4, data_size=2) == [((2, 10), 4)]


def test_texts_of_any_lengths_are_padded_by_a_third_of_a_window_at_most():
    texts = texts_of(*(range(2, 202)))
    of_rows = [1 - b.is_text_BS.double().mean(1) for (b,), _ in rounds(texts, 64, 8, RankShare())]
    assert max(map(float, torch.cat(of_rows))) <= 0.25


def test_many_short_texts_are_few_passes_of_many_ranks():
    texts = texts_of(*(range(2, 202)))
    assert passes(texts, 128, 8, data_size=64) == [((2, 128), 128), ((1, 72), 192), ((1, 40), 256), ((1, 8), 272)]


def test_a_pass_costs_what_its_windows_do_and_a_million_windows_take_little_memory():
    (text,) = texts = texts_of(4_000_001)
    tracemalloc.start()
    try:
        (windows,), done = next(rounds(texts, 4, 8, RankShare()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert windows.tokens_BS.untyped_storage().nbytes() <= 2 * 8 * 4 * 8 and done == 8
    assert text.windows(4) == 1_000_000 and peak < 100 * 1_000_000  # bytes; tokens and what is scored take 36 each


def test_sums_are_of_each_text_and_a_loss_that_is_not_finite_stays_there():
    texts = texts_of(9, 10, 11)
    ((windows,), _), *others = rounds(texts, 10, 4, RankShare())
    assert not others and windows.text_B.tolist() == [2, 1, 0]
    losses_BS = windows.labels_BS.float()
    expected = [float(text.stream[1:][text.scored[1:]].sum()) for text in texts]
    assert windows.nats(losses_BS, 3).tolist() == expected
    losses_BS[1, 0:2] = torch.nan
    assert windows.nats(losses_BS, 3)[[0, 2]].tolist() == [expected[0], expected[2]]
    assert windows.nats(losses_BS, 3)[1].isnan()


def test_losses_are_summed_in_fp64():
    ((windows,), _) = next(rounds(texts_of(3), 8, 1, RankShare()))
    losses_BS = torch.full((1, 2**20), 1.1)
    windows = dataclasses.replace(windows, scored_BS=torch.ones_like(losses_BS, dtype=torch.bool))
    assert windows.nats(losses_BS, 1).item() == pytest.approx(2**20 * torch.tensor(1.1).item(), rel=1e-12)
