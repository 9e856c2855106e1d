"""Pages of documentation in packages of Debian 12: fetched, unpacked, and turned into paragraphs of plain text."""

import fnmatch
import hashlib
import io
import os
import re
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

# the archive has a version until the next point release, snapshot every version for ever
MIRRORS = ("https://deb.debian.org/debian", "https://snapshot.debian.org/archive/debian/20260801T000000Z")
LIBREOFFICE = "pool/main/libr/libreoffice/libreoffice-help-{}_7.4.7-1+deb12u14_all.deb"
PACKAGES = {
    LIBREOFFICE.format("en-us"): "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    LIBREOFFICE.format("es"): "9128a84d83d92c8b1c618d90469d16affddb7d1290b09d42a0c5109cb16f0480",
    LIBREOFFICE.format("el"): "ed4c905d0df5761be817f59381ce7c48fa50ec9cef5737c83e66aa7d3c898f79",
    LIBREOFFICE.format("hu"): "d4ae75812fdeb6f2b03fac6bc0f95d3f6824b75706930e806d41c751e68ffe27",
    LIBREOFFICE.format("tr"): "8fe832104805b66d2dc5c153564bcc55b5a084e10b3c3a3ea773c4b57659bfb8",
    LIBREOFFICE.format("fr"): "c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206",
    LIBREOFFICE.format("de"): "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f",
    LIBREOFFICE.format("it"): "7fa29342a302bb495981fdabf98f3a9c3628123f3f191b2a5c95cb583c9ff212",
    LIBREOFFICE.format("pt"): "0130802d755de8666c663cc0745ba7a23d546d35a918f349a7a9adb78d16e7a4",
    (GNOME := "pool/main/g/gnome-user-docs/gnome-user-docs_43.0-2_all.deb"): (
        "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f"
    ),
    (MATE := "pool/main/m/mate-user-guide/mate-user-guide_1.26.0-1_all.deb"): (
        "34d11899bcaa51619a6b574178b5bd79e5f6c6dd7a25debf57d095f2ea51ccfd"
    ),
    (HANDBOOK := "pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb"): (
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"
    ),
}

BLOCK, DROP = "block", "drop"
Attributes = dict[str, str]
Kind = Callable[
    [str, Attributes], str | None
]  # of an element: its text is a paragraph, or is left out, or is as around it


def libreoffice_kind(tag: str, attributes: Attributes) -> str | None:
    kind = attributes.get("class", "")
    if tag in ("head", "script", "style", "footer") or kind in ("bascode", "pycode", "sqlcode"):
        return DROP
    if "hidden" in attributes and kind:  # of another program or system than the default, as `Command` for `Ctrl`
        return DROP
    is_text = re.fullmatch("p|h[1-6]", tag) and "id" in attributes
    return (DROP if "code" in kind else BLOCK) if is_text else None


def mallard_kind(tag: str, attributes: Attributes) -> str | None:
    if tag in ("info", "screen", "tt:div") or attributes.get("test") == "platform:gnome-classic":
        return DROP
    return BLOCK if tag in ("p", "title") else None


def docbook_kind(tag: str, attributes: Attributes) -> str | None:
    listing = ("screen", "programlisting", "literallayout", "synopsis")
    if tag in (*listing, "revhistory", "legalnotice", "remark", "textobject") or tag.endswith("indexterm"):
        return DROP
    return BLOCK if tag in ("para", "title", "term", "glossterm", "entry") else None


def handbook_kind(tag: str, attributes: Attributes) -> str | None:
    kinds = set(attributes.get("class", "").split())
    if tag in ("head", "pre") or kinds & {"docnav", "toc", "indexterm"} or attributes.get("id") in ("banner", "title"):
        return DROP
    return BLOCK if kinds & {"para", "title", "term"} or tag in ("td", "th") else None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pages of a name pattern in a package: `languages` maps ours to theirs; `english` is what was translated."""

    name: str
    package: str
    pages: str
    languages: dict[str, str]
    english: str
    kind: Kind
    not_pages: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


SOURCES = (
    Source(
        name="lohelp",
        package=LIBREOFFICE,
        pages="usr/share/libreoffice/help/{}/text/*.html",
        languages={"en": "en-US"}
        | {language: language for language in ("es", "el", "hu", "tr", "fr", "de", "it", "pt")},
        english="en-US",
        kind=libreoffice_kind,
        trained=("el", "hu", "tr", "en", "es"),
    ),
    Source(
        name="gnome",
        package=GNOME,
        pages="usr/share/help/{}/gnome-help/*.page",
        languages={"el": "el", "hu": "hu"},
        english="C",
        kind=mallard_kind,
    ),
    Source(
        name="mate",
        package=MATE,
        pages="usr/share/help/{}/mate-user-guide/*.xml",
        languages={"tr": "tr"},
        english="C",
        kind=docbook_kind,
        not_pages=("legal.xml",),
    ),
    Source(
        name="handbook",
        package=HANDBOOK,
        pages="usr/share/doc/debian-handbook/html/{}/*.html",
        languages={"en": "en-US", "es": "es-ES", "fr": "fr-FR", "de": "de-DE", "it": "it-IT", "pt": "pt-BR"},
        english="en-US",
        kind=handbook_kind,
        not_pages=("index.html",),
    ),
)


class Paragraphs(HTMLParser):
    """The text of a page's blocks, in reading order. Reads XML too, also MATE's, not all of which is well-formed."""

    CDATA_CONTENT_ELEMENTS = ("script", "style")
    RCDATA_CONTENT_ELEMENTS = ()  # newer versions of Python would not look into Mallard's titles
    WITHOUT_END = ("br", "hr", "img", "input")
    JOINERS = {"keycombo": "+", "keyseq": "+", "menuchoice": " ▸ ", "guiseq": " ▸ "}  # as their style sheets do

    def __init__(self, kind: Kind) -> None:
        super().__init__(convert_charrefs=True)
        self.kind = kind
        self.found: list[str] = []
        self.open: list[tuple[str, str | None]] = []
        self.blocks: list[list[str]] = []
        self.after_end = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.WITHOUT_END:
            return self.handle_data(" ")
        if self.after_end and self.open:
            self.handle_data(self.JOINERS.get(self.open[-1][0], ""))
        kind = self.kind(tag, {name: value or "" for name, value in attrs})
        self.open.append((tag, kind))
        self.after_end = False
        if kind == BLOCK:
            self.blocks.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_data(" " if tag in self.WITHOUT_END else "")

    def handle_endtag(self, tag: str) -> None:
        within = any(tag == opened for opened, _ in self.open)
        while within:
            opened, kind = self.open.pop()
            if kind == BLOCK and (text := " ".join("".join(self.blocks.pop()).split())):
                self.found.append(text)
            within = opened != tag
        self.after_end = True

    def handle_data(self, data: str) -> None:
        if self.blocks and not any(kind == DROP for _, kind in self.open):
            self.blocks[-1].append(data)


def pages_of(source: Source, language: str, folder: str, cache: Path) -> dict[str, list[str]]:
    package = source.package.format("en-us" if language == "en" else language)
    pattern = source.pages.format(folder)
    top = pattern.index("*")
    pages = {}
    for name, page in files_in(fetch(package, cache), pattern):
        if not name.endswith(source.not_pages):
            parser = Paragraphs(source.kind)
            parser.feed(page.decode("utf-8"))
            parser.close()
            pages[name[top:]] = parser.found
    return dict(sorted(pages.items()))


def fetch(package: str, cache: Path) -> bytes:
    """A package, from the cache or else from the archive."""
    path = cache / package.rsplit("/", 1)[1]
    if path.exists() and sha256(data := path.read_bytes()) == PACKAGES[package]:
        return data
    faults = []
    for mirror in MIRRORS:
        url = f"{mirror}/{urllib.parse.quote(package)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                data = answer.read()
        except OSError as error:
            faults.append(f"{url}: {error}")
            continue
        if (digest := sha256(data)) == PACKAGES[package]:
            write(path, data)
            return data
        faults.append(f"{url}: SHA-256 {digest}, not {PACKAGES[package]}")
    raise ValueError(f"cannot download {path.name}; put it into {cache} yourself, or try again ({'; '.join(faults)})")


def files_in(package: bytes, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The files of a Debian package, an `ar` archive with a `data.tar.xz` in it, whose names match."""
    start = len(b"!<arch>\n")
    while start < len(package):
        header, start = package[start : start + 60], start + 60
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[start : start + size])) as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if member.isfile() and fnmatch.fnmatchcase(name, pattern):
                        yield name, tar.extractfile(member).read()  # type: ignore[union-attr]
        start += size + size % 2


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(path: Path, data: bytes) -> str:
    """Replaces a file at once, and returns its SHA-256."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
    return sha256(data)
