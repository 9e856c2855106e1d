"""Pieces of pictures in SVG: text that is safe and fits, numbers of an axis, colours for light and dark."""

import html
import math
import re
import unicodedata

COLOURS = 8  # of lines, in STYLE; then they begin again, dashed
STYLE = """
svg{--ink:#1d2229;--soft:#68727f;--grid:#e4e7eb;
--c0:#0b63ce;--c1:#d9480f;--c2:#18864b;--c3:#8b3fc4;--c4:#b5850b;--c5:#0f8a96;--c6:#cf2f74;--c7:#5f6b7a;
font-family:system-ui,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;font-size:11px;fill:var(--ink)}
@media (prefers-color-scheme:dark){svg{--ink:#e4e8ee;--soft:#96a1b0;--grid:#2d343d;
--c0:#6aa9ff;--c1:#ff9258;--c2:#5bcb8b;--c3:#c793f2;--c4:#e5bd4f;--c5:#55ccd8;--c6:#ff81b0;--c7:#a9b4c2}}
.title{font-size:13px;font-weight:600}.soft{fill:var(--soft)}.end{text-anchor:end}.mid{text-anchor:middle}
.grid{stroke:var(--grid);fill:none;shape-rendering:crispEdges}.level{stroke:var(--soft);stroke-dasharray:4 3;fill:none}
.line{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.dots{stroke-width:4.5}.dash{stroke-dasharray:5 4}
.fine path{vector-effect:non-scaling-stroke}
.band{fill:var(--c);fill-opacity:.11;stroke:var(--c);stroke-opacity:.2;stroke-width:.6}
.over{fill:var(--ink);fill-opacity:0}.over:hover{fill-opacity:.1}
.cells{fill:none;shape-rendering:crispEdges}.none{stroke:var(--grid)}
.on-dark,.on-light{font-size:9px;fill:#fff}.on-light{fill:#111}
""" + "".join(f".s{number}{{--c:var(--c{number})}}" for number in range(COLOURS))
_BACKGROUND = "svg{background:#fff}@media (prefers-color-scheme:dark){svg{background:#14181d}}"
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: object) -> str:
    """Text as HTML and XML show it, whatever it holds."""
    return html.escape(_NOT_IN_XML.sub("\ufffd", str(text)))


def width_of(text: str, size: float = 11) -> float:
    """About what a text takes, in pixels; rather more."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.6 for c in text) * size


def shortened(text: str, width: float, size: float = 11) -> str:
    """A text that fits into so many pixels."""
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def titled(text: str, width: float) -> str:
    """Inside of a text element: what fits, and all of it for the pointer."""
    short = shortened(text, width)
    return escape(short) + (f"<title>{escape(text)}</title>" if short != text else "")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two, at most `most` + 1 of them."""
    step = _round_up((high - low) / most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _round_up(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next(size * times for times in (1, 2, 2.5, 5, 10, 20) if size * times >= step * (1 - 1e-9))


def tick_label(value: float, step: float, largest: float) -> str:
    """A number of an axis whose numbers are `step` apart, the largest of them `largest`: 0.25, 12k, 5e-05."""
    if abs(value) < step / 2:
        return "0"
    if largest < 1e-2:
        return f"{value:.3g}"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if largest >= max(size, 1e4) and step >= size / 100:
            return f"{value / size:g}{unit}"
    return f"{value:,.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    return next(number for number in range(16) if abs(round(step, number) - step) <= 1e-6 * step)


def number(value: float) -> str:
    """A value in four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def drawing(name: str, width: float, height: float, content: str) -> str:
    """A whole picture, which is shown in this size where there is room."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(name)}">{content}</svg>'


def as_file(svg: str) -> str:
    """The same as a file of its own, which brings its colours."""
    head, rest = svg.split(">", 1)
    return f"{head}><style>{STYLE}{_BACKGROUND}</style>{rest}\n"
