"""Bits per byte on held-out text: what a model pays for a corpus, whatever its tokenizer.

The documents of a corpus are laid end to end, `EOD d1 EOD d2 ... EOD dn EOD`, and read in windows that do
not overlap; as in training, the label of a window's last position is the first token of the next window.
Where documents open with a BOS token, as the model's tokenizer has it, the stream is `BOS d1 EOD BOS d2 ... EOD`.
Scored are the tokens of the documents, each exactly once. EOD and BOS are context and never scored: one of them opens
the stream so that the very first token has something to be predicted from, and they stand for no byte of the text. So

    bits per byte = sum over document tokens of -log2 p(token | window so far) / UTF-8 bytes of the documents

pays for every byte once, and two models with different tokenizers divide by the same number.

B: windows of one forward pass, S: tokens of a window, N: texts.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.windows import RankShare, Text, rounds, windows_in_all
from megatron_lpr.recipe.fields import required

_TICK_SECONDS = 10.0

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


NatsFn = Callable[[Sequence[Text], Callable[[int, int], None]], list[float]]
"""(texts, progress) -> of each the sum of -ln p over its scored tokens; `progress` is told (windows done, windows)."""


def scored_by(nll_fn: NllFn, *, window: int, batch: int) -> NatsFn:
    """A model in this process as what scores texts.

    Args:
        nll_fn: the model, which is causal: what fills up a shorter window lies behind its text.
        window: tokens of context at most, S.
        batch: windows of one forward pass at most, B.
    """

    def nats_of(texts: Sequence[Text], progress: Callable[[int, int], None]) -> list[float]:
        nats_N, in_all = torch.zeros(len(texts), dtype=torch.float64), windows_in_all(texts, window)
        for (windows,), done in rounds(texts, window, batch, RankShare()):
            nats_N += windows.nats(nll_fn(windows.tokens_BS, windows.labels_BS), len(texts)).cpu()
            progress(done, in_all)
        return nats_N.tolist()

    return nats_of


def score(
    nats_of: NatsFn, texts: Sequence[Text], report: Callable[[str], object] = lambda line: None
) -> tuple[CorpusScore, ...]:
    """Bits per byte of every text, under the definition above; `report` gets lines of progress.

    Raises:
        UserError: a loss that is not finite.
    """
    scores = []
    for text, nats in zip(texts, nats_of(texts, _Ticker(report)), strict=True):
        corpus = text.corpus
        title = f"evaluate {corpus.name} ({corpus.language})"
        if not math.isfinite(nats):
            raise UserError(
                f"the model's losses on held-out text are not finite ({nats} on {corpus.name}): its weights are damaged"
            )
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
    """A progress line every ten seconds: text takes seconds on a GPU and minutes on a CPU."""

    def __init__(self, report: Callable[[str], object]):
        self._report = report
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last >= _TICK_SECONDS:
            self._last = now
            self._report(f"evaluate  {100 * done // total:3d}% of the text")
