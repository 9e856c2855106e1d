"""Where a model sends each token of a text, as one HTML page without network or scripts: from plain numbers.

Shapes: T tokens, L MoE layers, E experts, the frozen ones first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lpr.reporting.html_page import CLOSING, opening, table
from megatron_lpr.reporting.svg import escape

_LEVELS = 20  # of the colours
_NEW, _EVEN, _FROZEN = (0xF1, 0xA3, 0x40), (0xF7, 0xF7, 0xF7), (0x99, 0x8E, 0xC3)  # told apart by colour-blind readers
_CONTROLS = {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421, ord("\n"): 0x21B5, ord("\t"): 0x21E5}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222;
  background: #fff }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .1em .6em; text-align: right }
td:first-child, th:first-child { text-align: left } .layers td, .layers th { padding: .1em .3em; font-size: 12px }
.line { display: flex } .share { flex: 0 0 4em; color: #777; font-size: 12px; padding-top: .2em }
.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0 } .text span { border-radius: 2px }
.control { border: 1px dotted #777; font-size: 11px } .faint { color: #999 }
.legend span { padding: .2em .8em }
"""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is drawn as one: the tokens `first` to `last` - 1 of a text, several where they share a character.

    label: what the reader is told of the tokens. is_control: it is no part of the text.
    """

    text: str
    label: str
    first: int
    last: int
    is_control: bool = False


@dataclass(frozen=True, kw_only=True)
class RoutedText:
    """A text and what became of its tokens.

    weights_TLE: share of each expert in what a layer makes of a token, 0 where it is not chosen; float.
    chosen_TLE: whether a token is sent to an expert; bool.
    """

    name: str
    pieces: Sequence[Piece]
    weights_TLE: np.ndarray
    chosen_TLE: np.ndarray

    def frozen_weights(self, num_frozen: int) -> np.ndarray:
        """[T, L]: weight of the frozen experts in each layer."""
        return self.weights_TLE[..., :num_frozen].sum(-1)

    def frozen_slots(self, num_frozen: int) -> np.ndarray:
        """[T, L]: share of a token's routing slots that frozen experts get."""
        return self.chosen_TLE[..., :num_frozen].sum(-1) / self.chosen_TLE.sum(-1)


@dataclass(frozen=True, kw_only=True)
class RoutingPage:
    """The page of some texts and one model.

    layers: numbers of the MoE layers. layer: index of the one that colours show, None: the mean over all.
    """

    title: str
    about: str
    num_frozen: int
    layers: Sequence[int]
    layer: int | None = None

    def html(self, texts: Sequence[RoutedText]) -> Iterator[str]:
        """The page, some of it at a time."""
        colours = "".join(f".c{level}{{background:{_colour(level / _LEVELS)}}}" for level in range(_LEVELS + 1))
        yield opening(self.title, _STYLE + colours)
        yield f"<h1>{escape(self.title)}</h1>\n<p>{escape(self.about)}</p>\n"
        yield self._legend()
        yield table(self.rows(texts), 1)
        yield self._layers(texts)
        for text in texts:
            yield f"<h2>{escape(text.name)}</h2>\n"
            yield from self._lines(text)
        yield CLOSING

    def shown(self, text: RoutedText) -> np.ndarray:
        """[T]: what colours show, the weight of the frozen experts."""
        weights_TL = text.frozen_weights(self.num_frozen)
        return weights_TL.mean(-1) if self.layer is None else weights_TL[:, self.layer]

    def rows(self, texts: Sequence[RoutedText]) -> list[list[str]]:
        """The summary, its header first."""
        of = "all layers" if self.layer is None else f"layer {self.layers[self.layer]}"
        rows = [["text", "tokens", "slots on frozen experts", "weight of frozen experts", f"weight, {of}"]]
        for text in texts:
            slots, weight = text.frozen_slots(self.num_frozen).mean(), text.frozen_weights(self.num_frozen).mean()
            rows.append(
                [text.name, f"{len(text.chosen_TLE):,}", *map(_percent, (slots, weight, self.shown(text).mean()))]
            )
        return [row[:4] for row in rows] if self.layer is None else rows

    def _legend(self) -> str:
        of = "the mean over all layers" if self.layer is None else f"layer {self.layers[self.layer]}"
        steps = "".join(
            f'<span class="c{level}">{100 * level // _LEVELS}%</span>' for level in range(0, _LEVELS + 1, 5)
        )
        frozen = "expert 0" if self.num_frozen == 1 else f"experts 0 to {self.num_frozen - 1}"
        return (
            f'<p class="legend">Weight of the frozen experts ({frozen}, marked *), {of}: {steps}</p>\n'
            "<p>Before each line its mean. Rest the pointer on a token to see its experts layer by layer. Tokens that "
            "share a character are drawn as one; what has a dotted frame is no part of the text.</p>\n"
        )

    def _layers(self, texts: Sequence[RoutedText]) -> str:
        """Weight of the frozen experts in percent, layer by layer."""
        lines = ["<tr><th>layer</th>" + "".join(f"<th>{layer}</th>" for layer in self.layers) + "</tr>\n"]
        for text in texts:
            means_L = text.frozen_weights(self.num_frozen).mean(0)
            cells = "".join(f'<td class="c{_level(mean)}">{100 * mean:.0f}</td>' for mean in means_L)
            lines.append(f"<tr><td>{escape(text.name)}</td>{cells}</tr>\n")
        return "<p>Layer by layer, in percent:</p>\n" + f'<table class="layers">\n{"".join(lines)}</table>\n'

    def _lines(self, text: RoutedText) -> Iterator[str]:
        """Each line of a text with its mean before it."""
        shown_T, weights_TL = self.shown(text), text.frozen_weights(self.num_frozen)
        line: list[Piece] = []
        for piece in text.pieces:
            line.append(piece)
            if "\n" in piece.text or piece is text.pieces[-1]:
                share = _percent(shown_T[line[0].first : line[-1].last].mean())
                yield f'<div class="line"><div class="share">{share}</div><div class="text" dir="auto">'
                yield "".join(self._piece(text, one, shown_T, weights_TL) for one in line)
                yield "</div></div>\n"
                line = []

    def _piece(self, text: RoutedText, piece: Piece, shown_T: np.ndarray, weights_TL: np.ndarray) -> str:
        tokens = slice(piece.first, piece.last)
        mean_LE = text.weights_TLE[tokens].mean(0)
        lines = [piece.label, f"frozen {_percent(weights_TL[tokens].mean())}"]
        for layer, mean_E in zip(self.layers, mean_LE, strict=True):
            experts = [expert for expert in np.argsort(-mean_E, kind="stable") if mean_E[expert] > 0]
            parts = (f"{e}{'*' if e < self.num_frozen else ''} {_percent(mean_E[e])}" for e in experts)
            lines.append(f"layer {layer}: {', '.join(parts)}")
        hover = escape("\n".join(line.translate(_CONTROLS) for line in lines)).replace("\n", "&#10;")
        kind = f"c{_level(shown_T[tokens].mean())}" + (" control" if piece.is_control else "")
        return f'<span class="{kind}" title="{hover}">{_visible(piece.text)}</span>'


def _visible(text: str) -> str:
    """Text in which every character is seen."""
    return escape(text.translate(_CONTROLS))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _level(share: float) -> int:
    return min(max(round(share * _LEVELS), 0), _LEVELS)


def _colour(share: float) -> str:
    """From the new experts' over a grey to the frozen ones'."""
    low, high, along = (_NEW, _EVEN, 2 * share) if share < 0.5 else (_EVEN, _FROZEN, 2 * share - 1)
    return "#" + "".join(f"{round(a + (b - a) * along):02x}" for a, b in zip(low, high, strict=True))
