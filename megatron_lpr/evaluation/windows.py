"""A held-out corpus as tokens, and the share of its windows that each rank computes.

The stream of a corpus (perplexity.py) is cut into windows that do not overlap. Data-parallel ranks divide the windows,
not the documents: every window is the same work, and no rank waits for one that has the longer texts. All ranks make
the same number of forward passes of one shape, as experts, pipelines and sequences that are spread over them ask for.
What fills the last ones up is padding: behind the text, where no token sees it, not scored and not counted by routers.

B: windows of one forward pass, S: positions of a window, T: tokens of a stream.
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
        UserError: there is none.
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
    return Text(corpus=corpus, stream=stream, scored=scored, bytes=scored_bytes)


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Which part of a corpus a rank computes: of the windows by its data-parallel rank, of each by its context rank.

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


def rounds(text: Text, window: int, batch: int, share: RankShare) -> Iterator[tuple[list[Windows], int]]:
    """The micro-batches of each round of forward passes, as many of one shape on every rank, and how many of all
    windows of the corpus are done with them."""
    number, ranks = text.windows(window), share.data_size
    micro_batches = 1
    if share.pipeline > 1:  # a multiple, for interleaved stages; more of them leave the stages less time to wait
        micro_batches = share.pipeline * min(4, math.ceil(number / (ranks * share.pipeline)))
    in_all = math.ceil(number / (micro_batches * ranks * batch))
    rows = math.ceil(number / (micro_batches * ranks * in_all))
    for index in range(in_all):
        numbers = range(index * micro_batches, (index + 1) * micro_batches)
        firsts = [(n * ranks + share.data_rank) * rows for n in numbers]
        done = min(numbers.stop * ranks * rows, number)
        yield [_windows(text, window, first, rows, share) for first in firsts], done


def _windows(text: Text, window: int, first: int, rows: int, share: RankShare) -> Windows:
    begin, positions = first * window, len(text.stream) - 1
    width = min(window, positions)
    length = math.ceil(width / share.multiple) * share.multiple

    end = min(begin + rows * width, positions)

    def laid_out(values: Tensor) -> Tensor:
        padded = torch.zeros(rows * width, dtype=values.dtype)
        padded[: len(values)] = values
        whole_BS = torch.nn.functional.pad(padded.view(rows, width), (0, length - width))
        return torch.from_numpy(rank_positions(whole_BS.numpy(), share.context_rank, share.context_size))

    return Windows(
        tokens_BS=laid_out(text.stream[begin:end]),
        labels_BS=laid_out(text.stream[begin + 1 : end + 1]),
        scored_BS=laid_out(text.scored[begin + 1 : end + 1]),
        is_text_BS=laid_out(torch.ones(max(end - begin, 0), dtype=torch.bool)),
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
