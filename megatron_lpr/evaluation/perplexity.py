"""Bits per byte on held-out text: what a model pays for a corpus, whatever its tokenizer.

The documents of a corpus are laid end to end, `EOD d1 EOD d2 ... EOD dn EOD`, and read in windows that do
not overlap; as in training, the label of a window's last position is the first token of the next window.
Where documents open with a BOS token, as the model's tokenizer has it, the stream is `BOS d1 EOD BOS d2 ... EOD`.
Scored are the tokens of the documents, each exactly once. EOD and BOS are context and never scored: one of them opens
the stream so that the very first token has something to be predicted from, and they stand for no byte of the text. So

    bits per byte = sum over document tokens of -log2 p(token | window so far) / UTF-8 bytes of the documents

pays for every byte once, and two models with different tokenizers divide by the same number.

B: windows of one forward pass, S: tokens of a window, V: vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_lpr.data.text.tokenize import Tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.held_out import HeldOut

# One call of the tokenizer: its encodings take a hundred times the memory of the text.
_BATCH_DOCUMENTS = 256

NllFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens_BS, labels_BS), int64 on the CPU -> nll_BS, float, any device: -ln p(label | tokens so far)."""


@dataclass(frozen=True, kw_only=True)
class CorpusScore:
    """The score of one model on one corpus; `tokens` and `bytes` count what was scored, EOD and BOS excluded."""

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
        nll_fn: the model. every call has S = `window` and at most `batch` rows, but for the last one, which is a
            shorter window where the stream ends: nothing is padded, for a router would see it as text.
        window: tokens of context at most, S.
        batch: windows of one forward pass, B.
        max_bytes: the corpus is cut after this many bytes, to a whole character, before it is tokenized:
            every model scores the same text.
        progress: called after each forward pass with (windows done, windows).

    Returns:
        bits per byte, tokens scored, bytes scored.

    Raises:
        UserError: no text, or a loss that is not finite.
    """
    documents = _cut(texts, max_bytes)
    scored_bytes = sum(len(document.encode("utf-8")) for document in documents)
    if not scored_bytes:
        raise UserError("no text to score: the corpus has no characters")
    stream, scored = _stream(tokenizer, documents)
    windows, done, nats = math.ceil((len(stream) - 1) / window), 0, 0.0
    for tokens_BS, labels_BS, scored_BS in _batches(stream, scored, window, batch):
        nll_BS = nll_fn(tokens_BS, labels_BS)
        nats += nll_BS.double().cpu()[scored_BS].sum().item()
        done += len(tokens_BS)
        if progress:
            progress(done, windows)
    if not math.isfinite(nats):
        raise UserError(f"the model's losses on held-out text are not finite ({nats}): its weights are damaged")
    return nats / math.log(2) / scored_bytes, int(scored.sum()), scored_bytes


def evaluate_corpora(
    nll_fn: NllFn,
    tokenizer: Tokenizer,
    corpora: Sequence[HeldOut],
    *,
    window: int,
    batch: int,
    max_bytes: int | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> tuple[CorpusScore, ...]:
    """Score every corpus; `report` gets lines of progress."""
    scores = []
    for held_out in corpora:
        corpus = held_out.corpus
        title = f"evaluate {corpus.name} ({corpus.language})"
        bits, tokens, scored_bytes = bits_per_byte(
            nll_fn,
            tokenizer,
            held_out.documents,
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
                bits_per_byte=bits,
                tokens=tokens,
                bytes=scored_bytes,
            )
        )
        report(f"{title}  {bits:.3f} bits per byte  {tokens:,} tokens  {scored_bytes:,} bytes")
    return tuple(scores)


class _Ticker:
    """A progress line every ten seconds: a corpus takes a second on a GPU and minutes on a CPU."""

    def __init__(self, title: str, report: Callable[[str], object], every_seconds: float = 10.0):
        self._title, self._report, self._every = title, report, every_seconds
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last >= self._every:
            self._last = now
            self._report(f"{self._title}  {100 * done // total:3d}%")


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
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = [] if opening else [eod]
    scored = [False] * len(tokens)
    for first in range(0, len(documents), _BATCH_DOCUMENTS):
        for ids in tokenizer.encode_batch(documents[first : first + _BATCH_DOCUMENTS]):
            tokens += [*opening, *ids, eod]
            scored += [*(False for _ in opening), *(True for _ in ids), False]
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(scored)


def _batches(
    stream: torch.Tensor, scored: torch.Tensor, window: int, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, labels and which labels are scored [B, S], of the positions of `stream` that have a label."""
    columns = stream[:-1], stream[1:], scored[1:]
    full = (len(stream) - 1) // window
    for first in range(0, full * window, batch * window):
        last = min(first + batch * window, full * window)
        tokens_BS, labels_BS, scored_BS = (column[first:last].view(-1, window) for column in columns)
        yield tokens_BS, labels_BS, scored_BS
    if full * window < len(stream) - 1:
        tokens_BS, labels_BS, scored_BS = (column[None, full * window :] for column in columns)
        yield tokens_BS, labels_BS, scored_BS
