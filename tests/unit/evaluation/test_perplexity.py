"""Bits per byte against models whose probabilities are known by hand."""

import dataclasses
import math

import pytest
import torch

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.perplexity import score, scored_by
from megatron_lpr.evaluation.windows import tokenized
from megatron_lpr.recipe.text_settings import EvaluationCorpus


class Letters:
    """Token = UTF-8 byte; 256 = EOS."""

    eod_id = 256
    bos_id = None

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode(self, text):
        return list(text.encode("utf-8"))


CORPUS = EvaluationCorpus(name="x", files=("a",), language="hu", role="expanded")


def bits_per_byte(nll_fn, tokenizer, documents, *, window, batch, max_bytes=None):
    """(bits per byte, tokens, bytes) of one corpus."""
    text = tokenized(tokenizer, CORPUS, documents, max_bytes)
    (found,) = score(scored_by(nll_fn, window=window, batch=batch), [text])
    return found.bits_per_byte, found.tokens, found.bytes


def uniform(vocab_size):
    return lambda tokens_BS, labels_BS: torch.full(labels_BS.shape, math.log(vocab_size))


def bigram(table, default):
    """-ln p(label | token) from a dict; a pair that is not in it costs `default`."""

    def nll_fn(tokens_BS, labels_BS):
        pairs = zip(tokens_BS.flatten().tolist(), labels_BS.flatten().tolist(), strict=True)
        return torch.tensor([table.get(pair, default) for pair in pairs]).view(labels_BS.shape)

    return nll_fn


@pytest.mark.parametrize("window", [1, 3, 4, 1000])
@pytest.mark.parametrize("batch", [1, 2, 100])
def test_uniform_model_pays_log_v_per_token(window, batch):
    # Two-byte letters, and a tokenizer of one token per letter: tokens and bytes differ.
    class TwoBytes(Letters):
        def encode(self, text):
            return [ord(letter) - ord("á") for letter in text]

    bits, tokens, size = bits_per_byte(uniform(1024), TwoBytes(), ["áéí", "óú"], window=window, batch=batch)
    assert (tokens, size) == (5, 10)
    assert bits == pytest.approx(10 * 5 / 10)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_pair_is_scored_once_and_no_eod_is(window, batch):
    eod, a, b = Letters.eod_id, ord("a"), ord("b")
    # Stream: EOD a b EOD b b a EOD. Scored labels: a|EOD, b|a, b|EOD, b|b, a|b. Others would cost a million.
    table = {(eod, a): 1.0, (a, b): 10.0, (eod, b): 100.0, (b, b): 1000.0, (b, a): 10000.0}
    table |= {(b, eod): 1e6, (a, eod): 1e6}
    bits, tokens, size = bits_per_byte(bigram(table, 1e6), Letters(), ["ab", "bba"], window=window, batch=batch)
    assert (tokens, size) == (5, 5)
    assert bits == pytest.approx(11111.0 / math.log(2) / 5)


def test_model_sees_contiguous_full_windows():
    calls = []

    def nll_fn(tokens_BS, labels_BS):
        calls.append((tokens_BS.tolist(), labels_BS.tolist()))
        return torch.zeros(labels_BS.shape)

    ticks = []
    text = tokenized(Letters(), CORPUS, ["abc", "d"])
    scored_by(nll_fn, window=2, batch=2)([text], lambda *tick: ticks.append(tick))
    e, a, b, c, d = 256, *b"abcd"
    assert calls == [([[e, a], [b, c]], [[a, b], [c, e]]), ([[e, d]], [[d, e]])]
    assert ticks == [(2, 3), (3, 3)]
    calls.clear()
    bits_per_byte(nll_fn, Letters(), ["abcd"], window=3, batch=2)
    assert calls == [([[e, a, b]], [[a, b, c]]), ([[c, d]], [[d, e]])]
    calls.clear()
    bits_per_byte(nll_fn, Letters(), ["abcdab"], window=4, batch=2)
    # What the shorter window is filled up with is behind it.
    assert calls == [([[e, a, b, c], [d, a, b, 0]], [[a, b, c, d], [a, b, e, 0]])]


def test_documents_open_with_the_tokenizer_s_bos():
    calls = []

    class WithBos(Letters):
        bos_id = 257

    def nll_fn(tokens_BS, labels_BS):
        calls.append((tokens_BS.tolist(), labels_BS.tolist()))
        return torch.where(labels_BS < 256, 1.0, 1e6)

    bits, tokens, size = bits_per_byte(nll_fn, WithBos(), ["ab", "c"], window=10, batch=1)
    s, a, b, e, c = 257, *b"ab", 256, ord("c")
    assert calls == [([[s, a, b, e, s, c]], [[a, b, e, s, c, e]])]
    assert (tokens, size) == (3, 3) and bits == pytest.approx(1 / math.log(2))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(loss):
    with pytest.raises(UserError, match=rf"losses on held-out text are not finite \({loss} on x\)"):
        bits_per_byte(lambda tokens, labels: torch.full(labels.shape, loss), Letters(), ["a"], window=4, batch=1)


def test_max_bytes_cuts_the_text_to_whole_characters():
    seen = []

    class Spy(Letters):
        def encode(self, text):
            seen.append(text)
            return super().encode(text)

    bits, tokens, size = bits_per_byte(uniform(2), Spy(), ["abc", "dé", "f"], window=8, batch=1, max_bytes=5)
    assert (seen, size) == (["abc", "d"], 4)
    assert bits == pytest.approx(1.0)
    *_, size = bits_per_byte(uniform(2), Letters(), ["é", "abc"], window=8, batch=1, max_bytes=4)
    assert size == 4  # é has two


def test_same_text_costs_the_same_under_another_tokenizer():
    """A model of letters and a model of letter pairs with the same distribution over texts agree."""

    class Pairs(Letters):
        def encode(self, text):
            data = text.encode()
            return [256 * data[i] + data[i + 1] for i in range(0, len(data), 2)]

    letters, *_ = bits_per_byte(uniform(26), Letters(), ["abcd", "ef"], window=3, batch=2)
    pairs, *_ = bits_per_byte(uniform(26**2), Pairs(), ["abcd", "ef"], window=3, batch=2)
    assert letters == pytest.approx(pairs)


def test_scores_of_corpora():
    texts = [
        tokenized(Letters(), dataclasses.replace(CORPUS, name=name), documents)
        for name, documents in (("help", ["abc", "de"]), ("two", ["é"]))
    ]
    lines = []
    scores = score(scored_by(uniform(8), window=4, batch=2), texts, lines.append)
    assert [(s.name, s.language, s.role, s.tokens, s.bytes) for s in scores] == [
        ("help", "hu", "expanded", 5, 5),
        ("two", "hu", "expanded", 2, 2),
    ]
    assert [s.bits_per_byte for s in scores] == pytest.approx([3.0, 3.0])
    assert lines == [
        "evaluate help (hu)  3.000 bits per byte  5 tokens  5 bytes",
        "evaluate two (hu)  3.000 bits per byte  2 tokens  2 bytes",
    ]


def test_texts_that_share_passes_cost_what_they_cost_alone():
    """Short and long ones, one of a single token, and two of one name; a token costs its place in the window."""
    documents = {"long": ["abcdefg", "hi"], "one": ["a"], "same": ["abc"], "words": ["abcde", "f", "ghijk"]}
    texts = [
        tokenized(Letters(), dataclasses.replace(CORPUS, name=name), words)
        for name, words in [*documents.items(), ("same", ["xyzxyzxyz"])]
    ]
    calls = []

    def nll_fn(tokens_BS, labels_BS):
        calls.append(len(tokens_BS))
        return 0.1 * labels_BS + (0.3 * tokens_BS).cumsum(1)

    def found(texts, batch):
        calls.clear()
        return score(scored_by(nll_fn, window=4, batch=batch), texts), list(calls)

    alone = [found([text], 1)[0][0] for text in texts]
    assert len({one.bits_per_byte for one in alone}) == len(texts)
    for batch, passes in ((1, [1] * 12), (5, [5, 4, 3]), (100, [9, 3])):
        together, sizes = found(texts, batch)
        assert sizes == passes and [one.name for one in together] == [one.name for one in alone]
        for one, other in zip(together, alone, strict=True):
            assert one == dataclasses.replace(other, bits_per_byte=pytest.approx(other.bits_per_byte, rel=1e-6))


def test_losses_of_one_text_that_are_not_finite_name_it_after_those_that_are():
    texts = [tokenized(Letters(), dataclasses.replace(CORPUS, name=w), [w]) for w in ("abc", "dzd", "efg")]
    lines = []
    with pytest.raises(UserError, match=r"not finite \(nan on dzd\)"):
        score(
            scored_by(lambda tokens, labels: torch.where(labels == ord("z"), math.nan, 1.0), window=8, batch=8),
            texts,
            lines.append,
        )
    assert [line.split()[1] for line in lines] == ["abc"]


def test_a_text_of_which_the_tokenizer_makes_nothing():
    class Deaf(Letters):
        def encode(self, text):
            return []

    with pytest.raises(UserError, match="no text to score, the tokenizer makes no token of its 3 bytes"):
        tokenized(Deaf(), CORPUS, ["a", "bc"])


def test_a_corpus_without_characters():
    with pytest.raises(
        UserError, match="no whole character in evaluation.max_bytes: 1; raise that, or name other files"
    ):
        tokenized(Letters(), CORPUS, ["é"], max_bytes=1)
    with pytest.raises(UserError, match="evaluation corpus x: no text to score"):
        tokenized(Letters(), CORPUS, ["", ""])
