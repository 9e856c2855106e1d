"""The page of a text's routing, from plain numbers."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_lpr.reporting.routing_page import Piece, RoutedText, RoutingPage

# four tokens, two layers, three experts: the first all frozen, the second all new, two that share a character
WEIGHTS = np.array(
    [
        [[1, 0, 0], [1, 0, 0]],
        [[0, 0.75, 0.25], [0, 0.75, 0.25]],
        [[0.5, 0.5, 0], [0, 1, 0]],
        [[0.5, 0, 0.5], [1, 0, 0]],
    ]
)
PIECES = (
    Piece(text="<|end|>", label="<|end|>: control token 0", first=0, last=1, is_control=True),
    Piece(text='<b "&">\n', label="'<b \"&\">\n': token 7", first=1, last=2),
    Piece(text="🦊", label="'🦊': tokens 8, 9", first=2, last=4),
)
TEXT = RoutedText(name="a <i>", pieces=PIECES, weights_TLE=WEIGHTS, chosen_TLE=WEIGHTS > 0)


class Reader(HTMLParser):
    """What a browser makes of a page: the tokens with their hover text, the words outside of them, all tags."""

    def __init__(self, page: str):
        super().__init__()
        self.tokens: list[list[str]] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        fields = dict(attributes)
        if "title" in fields:
            self._open = ["", fields["title"], fields["class"]]
            self.tokens.append(self._open)

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open is not None:
            self._open[0] += data
        else:
            self.words.append(data)


def read(**page) -> Reader:
    page = {"title": "T & T", "about": "x < y", "num_frozen": 1, "layers": [0, 2]} | page
    return Reader("".join(RoutingPage(**page).html([TEXT])))


def test_every_token_has_its_text_its_experts_and_its_colour():
    page = read()
    assert [token[0] for token in page.tokens] == ["<|end|>", '<b "&">↵', "🦊"]
    assert page.tokens[1][1].split("\n") == [
        "'<b \"&\">↵': token 7", "frozen 0.0%", "layer 0: 1 75.0%, 2 25.0%", "layer 2: 1 75.0%, 2 25.0%"
    ]  # fmt: skip
    assert page.tokens[2][1].split("\n") == [
        "'🦊': tokens 8, 9", "frozen 50.0%", "layer 0: 0* 50.0%, 1 25.0%, 2 25.0%", "layer 2: 0* 50.0%, 1 50.0%"
    ]  # fmt: skip
    assert [token[2] for token in page.tokens] == ["c20 control", "c0", "c10"]


def test_nothing_of_a_text_is_markup_and_nothing_is_fetched():
    page = read()
    known = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "span",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert set(page.tags) <= known
    assert "a <i>" in page.words and "T & T" in page.words
    text = "".join(RoutingPage(title="", about="", num_frozen=1, layers=[0, 2]).html([TEXT]))
    assert not re.search(r"https?:|src=|href=|url\(|<script", text)
    assert "default-src 'none'" in text  # nor could it be


def test_lines_and_texts_have_their_means():
    page = read()
    shares = [word for word in page.words if word.endswith("%")]
    # of the two lines: a frozen and a new token; two that share a character
    assert "50.0%" in shares and shares[-2:] == ["50.0%", "50.0%"]
    rows = RoutingPage(title="", about="", num_frozen=1, layers=[0, 2]).rows([TEXT])
    slots = np.mean([[1, 1], [0, 0], [0.5, 0], [0.5, 1]])
    assert rows[1] == ["a <i>", "4", f"{100 * slots:.1f}%", "50.0%"]


@pytest.mark.parametrize("layer, mean", [(0, "50.0%"), (1, "50.0%")])
def test_one_layer(layer, mean):
    page = RoutingPage(title="", about="", num_frozen=1, layers=[0, 2], layer=layer)
    assert page.rows([TEXT])[0][-1] == f"weight, layer {(0, 2)[layer]}"
    assert page.rows([TEXT])[1][-1] == mean
    assert np.array_equal(page.shown(TEXT), [[1, 0, 0.5, 0.5], [1, 0, 0, 1]][layer])


def test_several_frozen_experts_count_together():
    page = RoutingPage(title="", about="", num_frozen=2, layers=[0, 2])
    assert page.shown(TEXT).tolist() == [1, 0.75, 1, 0.75]
    assert "experts 0 to 1" in "".join(page.html([TEXT]))


def test_characters_that_cannot_be_seen_are_shown():
    piece = Piece(text="\x00\t\r", label="\x1b", first=0, last=1)
    text = RoutedText(name="x", pieces=[piece], weights_TLE=WEIGHTS[:1], chosen_TLE=WEIGHTS[:1] > 0)
    html = "".join(RoutingPage(title="", about="", num_frozen=1, layers=[0, 2]).html([text]))
    assert ">␀⇥␍</span>" in html and 'title="␛&#10;' in html
