"""Bits per byte on held-out text: what a model pays for a corpus, whatever its tokenizer.

The documents of a corpus are laid end to end, `EOD d1 EOD d2 ... EOD dn EOD`, and read in windows that do
not overlap; as in training, the label of a window's last position is the first token of the next window.
Scored are the tokens of the documents, each exactly once. EOD is context and never scored: it opens the
stream so that the very first token has something to be predicted from, and stands for no byte of the text. So

    bits per byte = sum over document tokens of -log2 p(token | window so far) / UTF-8 bytes of the documents

pays for every byte once, and two models with different tokenizers divide by the same number.

B: windows of one forward pass, S: tokens of a window, V: vocabulary.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_lpr.config import EvaluationCorpus
from megatron_lpr.data.documents import TextReader
from megatron_lpr.data.tokenize import Tokenizer
from megatron_lpr.errors import UserError

NllFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens_BS, labels_BS), int64 on the CPU -> nll_BS, float, any device: -ln p(label | tokens so far)."""


@dataclass(frozen=True, kw_only=True)
class CorpusScore:
    """The score of one model on one corpus; `tokens` and `bytes` count what was scored, EOD excluded."""

    name: str
    language: str
    role: str
    bits_per_byte: float
    tokens: int
    bytes: int


def bits_per_byte(
    nll_fn: NllFn,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int,
    batch: int,
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int, int]:
    """Score `texts`, documents of one corpus, under the definition above.

    Args:
        nll_fn: the model. every call has S = `window` (the last window is filled up with EOD, unscored) and
            at most `batch` rows.
        window: tokens of context at most, S.
        batch: windows of one forward pass, B.
        max_bytes: the corpus is cut after this many bytes, to a whole character, before it is tokenized:
            every model scores the same text.
        progress: called after each forward pass with (windows done, windows).

    Returns:
        bits per byte, tokens scored, bytes scored.

    Raises:
        UserError: no text.
    """
    documents = _cut(texts, max_bytes)
    scored_bytes = sum(len(document.encode("utf-8")) for document in documents)
    if not scored_bytes:
        raise UserError("no text to score: the corpus has no characters")
    stream, scored = _stream(tokenizer, documents)
    windows = math.ceil((len(stream) - 1) / window)
    eod = stream[0]
    missing = windows * window + 1 - len(stream)
    padded = torch.cat([stream, eod.repeat(missing)])
    tokens_WS, labels_WS = padded[:-1].view(windows, window), padded[1:].view(windows, window)
    scored_WS = torch.cat([scored[1:], scored.new_zeros(missing)]).view(windows, window)

    nats = 0.0
    for first in range(0, windows, batch):
        rows = slice(first, first + batch)
        nll_BS = nll_fn(tokens_WS[rows], labels_WS[rows])
        nats += nll_BS.double().cpu()[scored_WS[rows]].sum().item()
        if progress:
            progress(min(first + batch, windows), windows)
    return nats / math.log(2) / scored_bytes, int(scored.sum()), scored_bytes


def evaluate_corpora(
    nll_fn: NllFn,
    tokenizer: Tokenizer,
    corpora: Sequence[EvaluationCorpus],
    *,
    window: int,
    batch: int,
    max_bytes: int | None = None,
    report: Callable[[str], None] | None = None,
) -> tuple[CorpusScore, ...]:
    """Score every corpus; `report` receives progress lines (the default prints them on stderr).

    Raises:
        UserError: no corpora, a missing file, a corpus without text (all before the model runs).
    """
    if not corpora:
        raise UserError("nothing to evaluate: list held-out corpora under evaluation.corpora in the recipe")
    report = report or _print_on_stderr
    texts = [read_corpus(corpus) for corpus in corpora]
    scores = []
    for corpus, documents in zip(corpora, texts, strict=True):
        title = f"evaluate {corpus.name} ({corpus.language})"
        score = bits_per_byte(
            nll_fn,
            tokenizer,
            documents,
            window=window,
            batch=batch,
            max_bytes=max_bytes,
            progress=_Ticker(title, report),
        )
        scores.append(
            CorpusScore(
                name=corpus.name,
                language=corpus.language,
                role=corpus.role,
                bits_per_byte=score[0],
                tokens=score[1],
                bytes=score[2],
            )
        )
        report(f"{title}  {score[0]:.3f} bits per byte  {score[1]:,} tokens  {score[2]:,} bytes")
    return tuple(scores)


def read_corpus(corpus: EvaluationCorpus) -> list[str]:
    """The documents of a held-out corpus in file order.

    Raises:
        UserError: a missing or unreadable file, a line without text, no document in any of the files.
    """
    texts = list(TextReader(corpus.files, on_bad_line="refuse"))
    if not texts:
        raise UserError(f"evaluation corpus {corpus.name}: no text in {', '.join(corpus.files)}")
    return texts


class _Ticker:
    """A progress line every ten seconds: a corpus takes a second on a GPU and minutes on a CPU."""

    def __init__(self, title: str, report: Callable[[str], None], every_seconds: float = 10.0):
        self._title, self._report, self._every = title, report, every_seconds
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last >= self._every:
            self._last = now
            self._report(f"{self._title}  {100 * done // total:3d}%")


def _print_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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


def _stream(tokenizer: Tokenizer, documents: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The token stream [T] int64 and which of its tokens are scored [T] bool."""
    eod = tokenizer.eod_id
    tokens, scored = [eod], [False]
    for ids in tokenizer.encode_batch(documents):
        tokens += [*ids, eod]
        scored += [True] * len(ids) + [False]
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(scored)
