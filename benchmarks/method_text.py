"""Gets the text of the comparison in method.py from packages of Debian 12, with nothing but the standard library.

    python benchmarks/method_text.py [--out runs/method/text]

It writes gzip-compressed JSON lines, one document `{"id", "text"}` a line. A package is downloaded once, into
`packages` of the output folder, and checked by its SHA-256; files that are complete are left alone. The bytes of the
text depend on nothing but this program and the packages.

| corpus | languages | package, version | licence |
|---|---|---|---|
| lohelp: LibreOffice help | el, hu, tr, en, es, fr, de, it, pt | libreoffice-help-*, 7.4.7-1+deb12u14 | MPL-2.0 |
| gnome: GNOME user documentation | el, hu | gnome-user-docs, 43.0-2 | CC-BY-SA-3.0 |
| mate: MATE user guide | tr | mate-user-guide, 1.26.0-1 | GFDL-1.1+ |
| handbook: Debian Administrator's Handbook | en, es, fr, de, it, pt-BR | debian-handbook, 11.20220922 | CC-BY-SA-3.0 |

`NAME.validation` is what settings are chosen on, `NAME.heldout` what results are reported on; of LibreOffice help in
the languages that are trained on or replayed, the rest is `NAME.train`. The document's id decides where it goes. That
of LibreOffice help is the page, so that the same pages are held out in every language. A paragraph that comes several
times in a corpus is kept where it comes first, so that none is in two files; one that was left untranslated, in
English, is dropped, as program listings are.
"""

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import method_sources
from method_sources import SOURCES, Source, pages_of, sha256, write

EVALUATED_BYTES = 120_000  # at most, of a validation or held-out file
DOCUMENT_BYTES = range(200, 4000)  # less is no document; more is cut into several, but for LibreOffice's pages
HELD_OUT = 0.05  # of LibreOffice's pages, and as much for validation

# frequent there, and no frequent words of the other languages: not `in` or `not`
ENGLISH_WORDS = frozenset("the of and to is for that with this you are be".split())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/method/text"), help="output folder (%(default)s)")
    out = parser.parse_args(arguments).out
    try:
        get_text(out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def get_text(out: Path) -> None:
    made_by = sha256(Path(__file__).read_bytes() + Path(method_sources.__file__).read_bytes())
    index = out / "index.json"
    if is_complete(index, made_by):
        return print(f"{out}: already there")
    (out / "packages").mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, int | str]] = {}
    for source in SOURCES:
        english = pages_of(source, "en", source.english, out / "packages")
        originals = {paragraph for paragraphs in english.values() for paragraph in paragraphs}
        for language, folder in source.languages.items():
            foreign = language != "en"
            pages = pages_of(source, language, folder, out / "packages") if foreign else english
            for part, documents in split(source, language, pages, originals if foreign else set()).items():
                name = f"{source.name}.{language}.{part}.jsonl.gz"
                text = sum(len(document["text"].encode()) for document in documents)
                digest = write(out / name, gzipped(documents))
                files[name] = {"documents": len(documents), "bytes": text, "sha256": digest}
                print(f"{name}: {len(documents)} documents, {text:,} bytes", flush=True)
    write(index, json.dumps({"made_by": made_by, "files": files}, indent=1).encode())


def is_complete(index: Path, made_by: str) -> bool:
    if not index.exists() or (tree := json.loads(index.read_text()))["made_by"] != made_by:
        return False
    paths = {index.parent / name: entry["sha256"] for name, entry in tree["files"].items()}
    return all(path.exists() and sha256(path.read_bytes()) == digest for path, digest in paths.items())


def gzipped(documents: list[dict[str, str]]) -> bytes:
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    return gzip.compress(lines.encode(), mtime=0)


def split(
    source: Source, language: str, pages: dict[str, list[str]], english: set[str]
) -> dict[str, list[dict[str, str]]]:
    """Documents by the part that they belong to."""
    seen = set(english)
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "heldout": []}
    for page, paragraphs in pages.items():
        kept = [text for text in paragraphs if not (text in seen or seen.add(text) or english and is_english(text))]
        whole = [kept] if source.trained else pieces(kept)
        for number, piece in enumerate(whole):
            document = {"id": page if source.trained else f"{page}#{number}", "text": "\n".join(piece)}
            if len(document["text"].encode()) >= DOCUMENT_BYTES.start:
                parts[part_of(document["id"], HELD_OUT if source.trained else 0.5)].append(document)
    evaluated = {part: limited(parts[part]) for part in ("validation", "heldout")}
    return evaluated | ({"train": parts["train"]} if language in source.trained else {})


def place(identity: str) -> float:
    """Between 0 and 1: the same on every machine, and as good as random."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:6], "big") / 2**48


def part_of(identity: str, share: float) -> str:
    where = place(identity)
    return "heldout" if where < share else "validation" if where < 2 * share else "train"


def limited(documents: list[dict[str, str]]) -> list[dict[str, str]]:
    """As many as fit into an evaluation file, drawn at random, in the order they came."""
    room, chosen = EVALUATED_BYTES, set()
    for document in sorted(documents, key=lambda document: place(document["id"])):
        room -= len(document["text"].encode())
        if room < 0:
            break
        chosen.add(document["id"])
    return [document for document in documents if document["id"] in chosen]


def pieces(paragraphs: Iterable[str]) -> Iterator[list[str]]:
    """Runs of paragraphs that are about as long as a document should be."""
    piece: list[str] = []
    size = 0
    for text in paragraphs:
        piece.append(text)
        size += len(text.encode()) + 1
        if size >= DOCUMENT_BYTES.stop:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def is_english(text: str) -> bool:
    """Left in English, though not quite as the original is today: so much of it are words that only English has."""
    words = re.findall(r"\w+", text.lower())
    return sum(word in ENGLISH_WORDS for word in words) > 0.1 * len(words)


if __name__ == "__main__":
    sys.exit(main())
