"""benchmarks/method_text.py makes of packages what it says: clean text, and nothing both trained on and evaluated."""

import dataclasses
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"
LIBREOFFICE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>Lap</title></head>
<body><header><p>Súgó</p></header>
<script>if (a < b) "<p id='x'>";</script><h1 id="hd_1">Els&#337; <a href="x">cím</a></h1>
<p id="par_1" class="paragraph">Nyomja meg a <span class="switchinline"><span hidden="true" class="MAC">Command</span
><span hidden="true">Ctrl</span></span>+A<br>
billentyűt &amp; várjon.</p><p id="par_2" class="code">Print 1</p><div class="bascode"><p id="par_3">Sub</p></div>
<p id="bm_module"></p><footer><p id="f">Cím</p></footer></body></html>"""
MALLARD = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>Leírás.</desc><title type="link">L</title></info>
<title>A <app>Fájlok</app> megnyitása</title><steps>
<item><p>Nyomja le: <keyseq><key>Ctrl</key><key>F</key></keyseq>.</p>
</item></steps><if:choose><if:when test="platform:gnome-classic"><p>Klasszikus.</p></if:when></if:choose>
<screen>ls</screen><media type="image" src="x.png"/><p><link xref="a">Vége</link></p></page>"""
DOCBOOK = """<chapter><info><title>Bölüm</title><db:othercredit><db:firstname>Ad</db:firstname></db:othercredit></info>
<para><indexterm><primary>dizin</primary></indexterm><default:indexterm/>Seçin: <menuchoice><guimenu>Dosya</guimenu>
<guimenuitem>Aç</guimenuitem></menuchoice>.<itemizedlist><listitem><para>İç</para></listitem></itemizedlist></para>
<screen>ls</screen></chapter>"""
HANDBOOK = """<?xml version="1.0"?><html><head><title>T</title></head><body><p id="title"><a>Site</a></p>
<ul class="docnav top"><li>Weiter</li></ul><div class="toc"><div class="para">1. x</div></div>
<h2 class="title"><a id="a"></a>6.2. <code class="command">apt</code></h2><div class="para">
\tEin  Absatz.<img alt="" src="x"/></div><pre class="screen">ls</pre></body></html>"""


@pytest.fixture
def sources(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import method_sources

    return method_sources


@pytest.fixture
def text(sources):
    import method_text

    return method_text


@pytest.mark.parametrize(
    "name, page, found",
    [
        ("lohelp", LIBREOFFICE, ["Első cím", "Nyomja meg a Ctrl+A billentyűt & várjon."]),
        ("gnome", MALLARD, ["A Fájlok megnyitása", "Nyomja le: Ctrl+F.", "Vége"]),
        ("mate", DOCBOOK, ["Bölüm", "İç", "Seçin: Dosya ▸ Aç."]),
        ("handbook", HANDBOOK, ["6.2. apt", "Ein Absatz."]),
    ],
)
def test_paragraphs_without_what_is_around_them(sources, name, page, found):
    source = next(source for source in sources.SOURCES if source.name == name)
    parser = sources.Paragraphs(source.kind)
    parser.feed(page)
    parser.close()
    assert parser.found == found


def test_every_source_has_its_packages(sources):
    for source in sources.SOURCES:
        assert set(source.trained) <= set(source.languages)
        for language in source.languages:
            assert source.package.format("en-us" if language == "en" else language) in sources.PACKAGES


def page_of(language: str, number: int) -> str:
    own = f"{language} {number} " + "szó " * 60
    return f'<p id="a">{own}</p><p id="b">Click the button {number}.</p><p id="c">{language}: mindenhol</p>'


def package(language: str) -> bytes:
    """A Debian package with forty pages; what stands before data.tar.xz has an odd length."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=0) as tar:
        for name, page in [("copyright", "x"), *((f"text/{n:02}.html", page_of(language, n)) for n in range(40))]:
            member = tarfile.TarInfo(f"./help/{language}/{name}")
            member.size = len(page.encode())
            tar.addfile(member, io.BytesIO(page.encode()))
    archive = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0"), ("data.tar.xz", packed.getvalue())):
        archive += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return archive


@pytest.fixture
def mirror(sources, text, monkeypatch, tmp_path):
    """An archive with help in three languages; the mirror before it is damaged."""
    template = "pool/help-{}+1_all.deb"
    packages = {}
    for language in ("en-us", "hu", "fr"):
        path = tmp_path / "good" / template.format(language)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(package(language[:2]))
        packages[template.format(language)] = sources.sha256(path.read_bytes())
    damaged = tmp_path / "bad" / template.format("hu")
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"!<arch>\n")
    monkeypatch.setattr(sources, "PACKAGES", packages)
    monkeypatch.setattr(sources, "MIRRORS", [(tmp_path / name).as_uri() for name in ("bad", "good")])
    languages = {"en": "en", "hu": "hu", "fr": "fr"}
    source = dataclasses.replace(
        sources.SOURCES[0],
        package=template,
        pages="help/{}/text/*.html",
        languages=languages,
        english="en",
        trained=("en", "hu"),
    )
    monkeypatch.setattr(text, "SOURCES", [source])
    monkeypatch.setattr(text, "HELD_OUT", 0.25)
    return tmp_path / "good"


def documents(folder: Path, name: str) -> dict[str, str]:
    lines = gzip.decompress((folder / f"lohelp.{name}.jsonl.gz").read_bytes()).decode().splitlines()
    return {document["id"]: document["text"] for document in map(json.loads, lines)}


def test_corpora_from_packages(text, mirror, tmp_path, capsys, monkeypatch):
    out = tmp_path / "text"
    assert text.main(["--out", str(out)]) == 0
    found = {path.name.removesuffix(".jsonl.gz"): path.read_bytes() for path in out.glob("*.jsonl.gz")}
    assert len(found) == 8 and "lohelp.fr.train" not in found  # three parts of two languages, two of the third
    parts = {part: documents(out, f"hu.{part}") for part in ("train", "validation", "heldout")}
    assert sorted(page for part in parts.values() for page in part) == [f"{n:02}.html" for n in range(40)]
    assert all(parts.values())
    for part in ("validation", "heldout"):
        assert parts[part].keys() == documents(out, f"fr.{part}").keys() == documents(out, f"en.{part}").keys()
    whole = "\n".join(text for part in parts.values() for text in part.values())
    assert "Click" not in whole and whole.count("mindenhol") == 1
    assert "Click" in "".join(documents(out, "en.train").values())

    text.main(["--out", str(out)])
    assert "already there" in capsys.readouterr().out
    (out / "lohelp.hu.train.jsonl.gz").write_bytes(b"")
    (out / "packages" / "help-hu+1_all.deb").write_bytes(b"")
    text.main(["--out", str(out)])
    assert "already there" not in capsys.readouterr().out
    assert found == {path.name.removesuffix(".jsonl.gz"): path.read_bytes() for path in out.glob("*.jsonl.gz")}

    monkeypatch.setattr(text, "EVALUATED_BYTES", 700)
    text.get_text(other := tmp_path / "other")
    assert len(documents(other, "hu.heldout")) == 2 and documents(other, "hu.train") == parts["train"]


def test_a_package_that_no_mirror_has(text, mirror, tmp_path, capsys):
    (mirror / "pool" / "help-fr+1_all.deb").unlink()
    assert text.main(["--out", str(tmp_path / "text")]) == 2
    assert "error: cannot download help-fr+1_all.deb; put it into" in capsys.readouterr().err
    assert not (tmp_path / "text" / "index.json").exists()


def test_long_pages_become_documents_of_a_few_kilobytes(text):
    paragraphs = [f"{n} " + "x" * 1000 for n in range(10)]
    found = list(text.pieces(paragraphs))
    assert [len(piece) for piece in found] == [4, 4, 2] and sum(found, []) == paragraphs


@pytest.mark.parametrize(
    "paragraph, english",
    [
        ("Click the button to close this window.", True),
        ("Kattintson az AutoCorrect Options gombra.", False),
        ("Les directives Allow from contrôlent l'accès à un répertoire", False),
        ("Dosyalara not ekleyin", False),
    ],
)
def test_paragraphs_left_in_english(text, paragraph, english):
    assert text.is_english(paragraph) == english
