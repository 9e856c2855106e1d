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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.windows import Text
from megatron_lpr.recipe.fields import required

NllFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens_BS, labels_BS), int64 on the CPU -> nll_BS, float, any device: -ln p(label | tokens so far)."""


@dataclass(frozen=True, kw_only=True)
class CorpusScore:
    """The score of one model on one corpus; `tokens` and `bytes` count what was scored, EOD and BOS excluded."""

    name: str
    language: str
    role: str
    bits_per_byte: float = required("what the model pays for a byte", above=0)
    tokens: int
    bytes: int = required("of the text, in UTF-8", at_least=1)


NatsFn = Callable[[Text, Callable[[int, int], None]], float]
"""(text, progress) -> the sum of -ln p over its scored tokens; `progress` is told (windows done, windows)."""


def scored_by(nll_fn: NllFn, *, window: int, batch: int) -> NatsFn:
    """A model in this process as what scores a text.

    Args:
        nll_fn: the model. Every call has S = `window` and at most `batch` rows, but for the last one, which is a
            shorter window where the stream ends: nothing is padded.
        window: tokens of context at most, S.
        batch: windows of one forward pass, B.
    """

    def nats_of(text: Text, progress: Callable[[int, int], None]) -> float:
        done, nats = 0, 0.0
        for tokens_BS, labels_BS, scored_BS in _batches(text.stream, text.scored, window, batch):
            nll_BS = nll_fn(tokens_BS, labels_BS)
            nats += nll_BS.double().cpu()[scored_BS].sum().item()
            done += len(tokens_BS)
            progress(done, text.windows(window))
        return nats

    return nats_of


def score(
    nats_of: NatsFn, texts: Iterable[Text], report: Callable[[str], object] = lambda line: None
) -> tuple[CorpusScore, ...]:
    """Bits per byte of every text, under the definition above; `report` gets lines of progress.

    Raises:
        UserError: a loss that is not finite.
    """
    scores = []
    for text in texts:
        corpus = text.corpus
        title = f"evaluate {corpus.name} ({corpus.language})"
        nats = nats_of(text, _Ticker(title, report))
        if not math.isfinite(nats):
            raise UserError(f"the model's losses on held-out text are not finite ({nats}): its weights are damaged")
        scores.append(
            CorpusScore(
                name=corpus.name,
                language=corpus.language,
                role=corpus.role,
                bits_per_byte=nats / math.log(2) / text.bytes,
                tokens=int(text.scored.sum()),
                bytes=text.bytes,
            )
        )
        bits, tokens = scores[-1].bits_per_byte, scores[-1].tokens
        report(f"{title}  {bits:.3f} bits per byte  {tokens:,} tokens  {text.bytes:,} bytes")
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
