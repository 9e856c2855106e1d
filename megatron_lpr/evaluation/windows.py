"""Held-out corpora as tokens, and the share of their windows that each rank computes.

The stream of a corpus (perplexity.py) is cut into windows that do not overlap. The windows of all corpora are one
queue, the longest first: a forward pass takes the next ones, whatever texts they are of, and the short ones at the ends
of texts come together. Data-parallel ranks divide the windows of a round of passes, which have one shape on all ranks,
as experts, pipelines and sequences that are spread over ranks ask for; no rank waits for one that has the longer texts.
What fills windows up is padding: behind the text, where no token sees it, not scored and not counted by routers.

B: windows of one forward pass, S: positions of a window, T: tokens of a stream, N: texts, W: windows of all of them.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_lpr.data.text.tokenize import Tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.platform.context_parallel import rank_positions
from megatron_lpr.recipe.text_settings import EvaluationCorpus

# One call of the tokenizer: its encodings take a hundred times the memory of the text.
_BATCH_DOCUMENTS = 256

# Rows of a pass are for windows that are at least so long as this share of its longest; shorter ones wait for the next.
_ALIKE = 0.75


@dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus as tokens; `bytes` are those of its documents."""

    corpus: EvaluationCorpus
    stream: Tensor  # [T] int64
    scored: Tensor  # [T] bool
    bytes: int

    def windows(self, window: int) -> int:
        return math.ceil((len(self.stream) - 1) / window)


def tokenized(
    tokenizer: Tokenizer, corpus: EvaluationCorpus, documents: Sequence[str], max_bytes: int | None = None
) -> Text:
    """The text of a corpus, cut after `max_bytes` to a whole character.

    Raises:
        UserError: there is none, or the tokenizer makes nothing of it.
    """
    documents = _cut(documents, max_bytes)
    scored_bytes = sum(len(document.encode("utf-8")) for document in documents)
    if not scored_bytes:
        cut = "" if max_bytes is None else f" in evaluation.max_bytes: {max_bytes}"
        raise UserError(
            f"evaluation corpus {corpus.name}: no text to score, its documents have no whole character{cut}; "
            f"{'raise that, or name' if cut else 'name'} other files"
        )
    stream, scored = _stream(tokenizer, documents)
    if not scored.any():
        raise UserError(
            f"evaluation corpus {corpus.name}: no text to score, the tokenizer makes no token of its {scored_bytes} "
            "bytes; name other files, or leave it out"
        )
    return Text(corpus=corpus, stream=stream, scored=scored, bytes=scored_bytes)


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Which part of the text a rank computes: of the windows by its data-parallel rank, of each by its context rank.

    pipeline: stages, which are busy at once where there are several micro-batches.
    multiple: what the positions of a window must be a multiple of.
    """

    data_rank: int = 0
    data_size: int = 1
    context_rank: int = 0
    context_size: int = 1
    pipeline: int = 1
    multiple: int = 1


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of one forward pass on one rank, [B, S]; `is_text` is false where they are padded."""

    tokens_BS: Tensor
    labels_BS: Tensor
    scored_BS: Tensor
    is_text_BS: Tensor
    text_B: Tensor  # the number of the text that a window is of

    @property
    def tags_BS(self) -> Tensor:
        """The tags by which routers count each text as a language of its own, and padding as none."""
        return (self.text_B + 1)[:, None] * self.is_text_BS

    def nats(self, losses_BS: Tensor, texts: int) -> Tensor:
        """The sum of the losses of the scored tokens of each text [N], in fp64.

        A loss that is not finite stays with its text, and the order of additions is the same each time.
        """
        scored_BS, text_B = self.scored_BS.to(losses_BS.device), self.text_B.to(losses_BS.device)
        nats_B = torch.where(scored_BS, losses_BS.double(), 0.0).sum(1)
        is_of_NB = text_B == torch.arange(texts, device=text_B.device)[:, None]
        return torch.where(is_of_NB, nats_B, 0.0).sum(1)


def windows_in_all(texts: Sequence[Text], window: int) -> int:
    """How many `rounds` have."""
    return sum(text.windows(window) for text in texts)


def rounds(texts: Sequence[Text], window: int, batch: int, share: RankShare) -> Iterator[tuple[list[Windows], int]]:
    """The micro-batches of each round of forward passes, as many of one shape on every rank, and how many of all
    windows are done with them."""
    places, ranks, done = _places(texts, window), share.data_size, 0
    ascending_W = -places[:, 2]
    while done < len(places):
        alike = int(np.searchsorted(ascending_W, _ALIKE * ascending_W[done], side="right")) - done
        micro_batches = 1
        if share.pipeline > 1:  # a multiple, for interleaved stages; more of them leave the stages less time to wait
            micro_batches = share.pipeline * min(4, math.ceil(alike / (ranks * share.pipeline)))
        rows = min(batch, math.ceil(alike / (micro_batches * ranks)))
        length = math.ceil(places[done, 2] / share.multiple) * share.multiple
        firsts = [done + (n * ranks + share.data_rank) * rows for n in range(micro_batches)]
        done = min(done + micro_batches * ranks * rows, len(places))
        yield [_windows(texts, places[first : first + rows], (rows, length), share) for first in firsts], done


def _places(texts: Sequence[Text], window: int) -> np.ndarray:
    """(text, first position, length) of every window [W, 3]: the longest first, those of one length in the order of
    the texts. Numbers, for there may be millions."""
    places = []
    for number, text in enumerate(texts):
        positions = len(text.stream) - 1
        first_W = np.arange(0, positions, window)
        places.append(np.stack([np.full_like(first_W, number), first_W, np.minimum(positions - first_W, window)], 1))
    places_W3 = np.concatenate(places)
    return places_W3[np.argsort(-places_W3[:, 2], kind="stable")]


def _windows(texts: Sequence[Text], places: np.ndarray, shape_BS: tuple[int, int], share: RankShare) -> Windows:
    """Those at `places`, of which a rank may have fewer than B, or none."""
    tokens_BS, labels_BS = np.zeros((2, *shape_BS), np.int64)
    scored_BS, is_text_BS = np.zeros((2, *shape_BS), np.bool_)
    text_B = np.zeros(shape_BS[0], np.int64)
    for row, (number, first, length) in enumerate(places):
        text, end = texts[number], first + length
        tokens_BS[row, :length] = text.stream[first:end]
        labels_BS[row, :length] = text.stream[first + 1 : end + 1]
        scored_BS[row, :length] = text.scored[first + 1 : end + 1]
        is_text_BS[row, :length] = True
        text_B[row] = number
    columns = {"tokens_BS": tokens_BS, "labels_BS": labels_BS, "scored_BS": scored_BS, "is_text_BS": is_text_BS}
    return Windows(
        text_B=torch.from_numpy(text_B),
        **{
            name: torch.from_numpy(rank_positions(column_BS, share.context_rank, share.context_size))
            for name, column_BS in columns.items()
        },
    )


def _cut(texts: Sequence[str], max_bytes: int | None) -> list[str]:
    if max_bytes is None:
        return list(texts)
    documents, left = [], max_bytes
    for text in texts:
        data = text.encode("utf-8")
        documents.append(data[:left].decode("utf-8", errors="ignore"))
        left -= len(data)
        if left <= 0:
            break
    return documents


def _stream(tokenizer: Tokenizer, documents: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The token stream [T] int64 and which of its tokens are scored [T] bool; nine bytes for a token meanwhile."""
    eod = tokenizer.eod_id
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = array("q", [] if opening else [eod])
    scored = bytearray(len(tokens))
    for first in range(0, len(documents), _BATCH_DOCUMENTS):
        for ids in tokenizer.encode_batch(documents[first : first + _BATCH_DOCUMENTS]):
            tokens.extend([*opening, *ids, eod])
            scored += bytes(len(opening)) + b"\1" * len(ids) + b"\0"
    return torch.tensor(np.frombuffer(tokens, np.int64)), torch.tensor(np.frombuffer(scored, np.bool_))
