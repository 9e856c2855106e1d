"""A page of HTML that needs nothing but itself: no script, no network, no file beside it."""

from collections.abc import Iterable, Mapping, Sequence

from megatron_lpr.reporting.svg import STYLE, escape

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1d2229;--soft:#68727f;--rule:#e1e5ea;--card:#f7f8fa;--mark:#fff3d6}
@media (prefers-color-scheme:dark){
:root{--back:#14181d;--ink:#e4e8ee;--soft:#96a1b0;--rule:#2d343d;--card:#1b2027;--mark:#3d3418}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:25px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:42px 0 10px;padding-top:14px;border-top:1px solid var(--rule)}
h3{font-size:15px;margin:22px 0 6px;overflow-wrap:anywhere}p{margin:6px 0;max-width:75ch}.soft{color:var(--soft)}
nav{margin:10px 0 0;font-size:14px}nav a{color:inherit;margin-right:16px;white-space:nowrap}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:22px 24px;margin:14px 0}
.wide{display:flex;flex-direction:column;gap:14px}
figure{margin:0;min-width:0}figure>svg{display:block;max-width:100%;height:auto}
.scroll{overflow-x:auto;margin:10px 0}table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th{font-weight:600;max-width:44ch;overflow-wrap:anywhere}tbody th{font-weight:400;color:var(--soft);white-space:nowrap}
td{max-width:44ch;overflow-wrap:anywhere}td.n,th.n{text-align:right}
thead th.n{min-width:9ch;max-width:20ch;vertical-align:bottom}
td.differs{background:var(--mark)}
pre{background:var(--card);padding:12px 14px;overflow-x:auto;font:12.5px/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
summary{cursor:pointer;color:var(--soft);margin:8px 0}
@media print{main{max-width:none}figure{break-inside:avoid}}
"""
CLOSING = "</body></html>\n"


def page(title: str, head: str, sections: Mapping[str, str]) -> str:
    """A whole page; `head` and `sections`, by their titles, are HTML. Empty sections are left out."""
    shown = {name: content for name, content in sections.items() if content}
    ids = {name: f"s{number}" for number, name in enumerate(shown)}
    links = "".join(f'<a href="#{ids[name]}">{escape(name)}</a>' for name in shown)
    body = "".join(f'<section id="{ids[name]}"><h2>{escape(name)}</h2>{shown[name]}</section>\n' for name in shown)
    main = f"<main><h1>{escape(title)}</h1>{head}<nav>{links}</nav>\n{body}</main>"
    return opening(title, _STYLE + STYLE) + main + CLOSING


def opening(title: str, style: str) -> str:
    """What any page begins with, up to its body; `CLOSING` ends it."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>"
    )


def pictures(found: Iterable[tuple[str, str]], *, wide: bool = False) -> str:
    """Named pictures beside each other, or below each other."""
    figures = "".join(f"<figure>{picture}</figure>" for _, picture in found)
    return f'<div class="{"wide" if wide else "pictures"}">{figures}</div>' if figures else ""


def table(rows: Sequence[Sequence[str]], left_columns: int) -> str:
    """Cells of text; the first row is the header. Columns after `left_columns` hold numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if column < left_columns else ' class="n"' for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows[1:])
    return (
        f'<div class="scroll"><table><thead><tr>{line(rows[0], "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def facts(names: Sequence[str], rows: Mapping[str, Sequence[str | None]], *, mark: bool = False) -> str:
    """What there is to say of things, side by side; rows that say nothing are left out.

    Args:
        names: of the things. A single one needs none.
        mark: the cells of a row that are not as the first.
    """
    lines = []
    for label, values in rows.items():
        if not any(values):
            continue
        kinds = [' class="differs"' if mark and value != values[0] else "" for value in values]
        cells = "".join(f"<td{kind}>{escape(value or '–')}</td>" for kind, value in zip(kinds, values, strict=True))
        lines.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    if not lines:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(names) > 1 else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def paragraph(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def folded(summary: str, text: str) -> str:
    """Plain text that is there for whoever opens it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
