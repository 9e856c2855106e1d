"""Text files of every kind: found, cut into blocks, refused where incomplete."""

import bz2
import gzip
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_lpr.data.text import text_files
from megatron_lpr.data.text.documents import BadLine, Document, Reading, TextReader, documents_of
from megatron_lpr.data.text.text_files import expand, files_sha256, format_of, read_blocks
from megatron_lpr.errors import UserError

TEXTS = [f"fox number {number} árvíz" * (1 + number % 5) for number in range(40)]


def read(path: str, block_bytes: int = 1 << 20, **reading) -> list[Document | BadLine]:
    reading = Reading(**reading)
    blocks = read_blocks([path], format=reading.format, sample_by=reading.sample_by, block_bytes=block_bytes)
    return [document for block in blocks for document in documents_of(block, reading)]


def texts(documents: list[Document | BadLine]) -> list[str]:
    assert all(isinstance(document, Document) for document in documents)
    return [document.text for document in documents]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_json_lines(write_text, suffix, block_bytes):
    documents = read(write_text(f"a.jsonl{suffix}", [*TEXTS[:20], b"", *TEXTS[20:]]), block_bytes)
    assert texts(documents) == TEXTS
    assert [document.line for document in documents] == [*range(1, 21), *range(22, 42)]


def test_places_do_not_depend_on_the_blocks(write_text):
    path = write_text("a.jsonl", TEXTS)
    with open(path, "rb") as file:
        content = file.read()
    for block_bytes in (1, 64, 1000, 1 << 20):
        for document in read(path, block_bytes):
            assert content[document.offset :].startswith(b'{"text": "fox')
            assert content[: document.offset].count(b"\n") == document.line - 1
    assert len(list(read_blocks([path], block_bytes=64))) > 10


def test_a_last_line_without_its_end_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fox"}\r\n{"text": "dog"}')
    assert texts(read(str(path))) == ["fox", "dog"]


def test_members_and_frames(tmp_path):
    lines = [f'{{"text": "{text}"}}\n'.encode() for text in TEXTS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    (tmp_path / "a.jsonl.bz2").write_bytes(b"".join(map(bz2.compress, lines)))
    # Streams of xz may have zeros between them, and behind the last.
    (tmp_path / "a.jsonl.xz").write_bytes(b"".join(lzma.compress(line) + bytes(8) for line in lines))
    for suffix in ("gz", "zst", "bz2", "xz"):
        assert texts(read(str(tmp_path / f"a.jsonl.{suffix}"))) == TEXTS


KINDS = [(".gz", "gzip"), (".zst", "zstd"), (".bz2", "bzip2"), (".xz", "xz")]


@pytest.mark.parametrize("suffix, kind", KINDS)
def test_what_follows_a_complete_file(write_text, suffix, kind):
    path = write_text(f"a.jsonl{suffix}", TEXTS)
    with open(path, "ab") as file:
        file.write(b"more text, which nobody compressed")
    with pytest.raises(UserError, match=f"a.jsonl{suffix} is not a complete {kind} file"):
        read(path)


@pytest.mark.parametrize("suffix, kind", KINDS)
def test_compressed_files_of_no_byte(tmp_path, suffix, kind):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"")
    with pytest.raises(UserError, match=f"a.jsonl{suffix} is empty, not even a compressed file of nothing"):
        read(str(tmp_path / f"a.jsonl{suffix}"))


@pytest.mark.parametrize("suffix, kind", KINDS)
def test_incomplete_files(write_text, tmp_path, suffix, kind):
    path = write_text(f"a.jsonl{suffix}", TEXTS)
    for size in range(1, os.path.getsize(path), 7):
        os.truncate(write_text(f"a.jsonl{suffix}", TEXTS), size)
        with pytest.raises(UserError, match=f"a.jsonl{suffix} is not a complete {kind} file"):
            read(path)
    (tmp_path / f"b.jsonl{suffix}").write_text('{"text": "fox"}')
    with pytest.raises(UserError, match=f"b.jsonl{suffix} is not a complete {kind} file"):
        read(str(tmp_path / f"b.jsonl{suffix}"))


def write_parquet(path, columns: dict, row_group_size: int = 7) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": range(40), "content": TEXTS, "lang": ["hu", "en"] * 20})
    documents = read(path, text_field="content", language_field="lang", languages=("en", "hu"))
    assert texts(documents) == TEXTS
    assert [(d.offset, d.line, d.language) for d in documents[6:8]] == [(6, 7, "hu"), (7, 8, "en")]
    with pytest.raises(UserError, match="a.parquet has no column 'text'; it has id, content, lang"):
        read(path)


def test_parquet_bad_rows(tmp_path):
    column = pa.array([b"fox", b"caf\xe9", b" ", None, b"dog"]).cast(pa.binary()).view(pa.binary())
    strings = pa.StringArray.from_buffers(5, *column.buffers()[1:], column.buffers()[0])
    path = write_parquet(tmp_path / "a.parquet", {"text": strings})
    rows = [row.text if isinstance(row, Document) else (row.line, row.reason) for row in read(path)]
    assert rows == ["fox", (2, "invalid UTF-8"), (3, "empty text"), (4, 'no "text" string'), "dog"]


def test_parquet_columns_of_another_kind(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": pa.array([b"fox"], pa.binary())})
    assert [str(row) for row in read(path)] == [
        f'{path}:1: no "text" string (it is bytes; write it as text, or name another with text_field)'
    ]
    pq.write_table(pa.Table.from_arrays([pa.array(["fox"]), pa.array(["dog"])], names=["text", "text"]), path)
    with pytest.raises(UserError, match="a.parquet has several columns 'text'; write it with one of that name"):
        read(path)


def test_parquet_incomplete(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    size = os.path.getsize(path)
    with open(path, "r+b") as file:  # a page of zeros in the middle: the footer still reads
        file.seek(4)
        file.write(bytes(200))
    with pytest.raises(UserError, match="a.parquet is not a complete Parquet file"):
        read(path)
    os.truncate(path, size - 20)
    with pytest.raises(UserError, match="a.parquet is not a complete Parquet file"):
        read(path)


PLAIN = "first line\nsecond line\n\n \t\nthird\r\n\r\nfourth\n"


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize(
    "sample_by, expected",
    [
        ("document", [(1, PLAIN)]),
        ("paragraph", [(1, "first line\nsecond line"), (5, "third"), (7, "fourth")]),
        ("line", [(1, "first line"), (2, "second line"), (5, "third"), (7, "fourth")]),
    ],
)
def test_plain_text(tmp_path, sample_by, expected, block_bytes):
    (tmp_path / "a.txt").write_bytes(PLAIN.encode())
    documents = read(str(tmp_path / "a.txt"), block_bytes, sample_by=sample_by)
    assert [(document.line, document.text) for document in documents] == expected


def test_plain_text_bad_places(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    assert read(str(tmp_path / "a.txt")) == [BadLine(str(tmp_path / "a.txt"), 3, "invalid UTF-8")]
    (tmp_path / "b.txt").write_bytes(b"")
    assert read(str(tmp_path / "b.txt")) == [BadLine(str(tmp_path / "b.txt"), 1, "empty text")]


def test_a_document_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_DOCUMENT", 1000)
    (tmp_path / "a.txt").write_text("fox\n\n" * 1000)
    with pytest.raises(UserError, match="a.txt holds a document of more than .*sample_by: paragraph"):
        read(str(tmp_path / "a.txt"), 100)
    assert len(read(str(tmp_path / "a.txt"), 100, sample_by="paragraph")) == 1000


def test_formats_go_by_name():
    names = ["a.jsonl", "a.json.gz", "a", "a.txt", "a.txt.zst", "a.txt.xz", "a.parquet"]
    assert [format_of(name) for name in names] == ["jsonl", "jsonl", "jsonl", "text", "text", "text", "parquet"]
    assert format_of("a.txt", "jsonl") == "jsonl"


def test_patterns(write_text, tmp_path):
    paths = [write_text(f"{name}.jsonl", TEXTS) for name in ("b", "a", "c[1]")]
    assert expand([str(tmp_path / "?.jsonl"), paths[2]]) == (paths[1], paths[0], paths[2])
    with pytest.raises(UserError, match="no file .*x.*jsonl"):
        expand([str(tmp_path / "x*.jsonl")])
    with pytest.raises(UserError, match="no file .*, which is a folder; name files in it, as ") as refused:
        expand([str(tmp_path)])
    assert expand([str(refused.value).split(", as ")[1]]) == (paths[1], paths[0], paths[2])


def test_digest_tells_bytes_order_and_settings(write_text):
    one, two = write_text("a.jsonl", TEXTS), write_text("b.jsonl", TEXTS[:3])
    digests = {
        files_sha256(files, settings)
        for files, settings in (([one, two], None), ([two, one], None), ([one], None), ([one], {"sample_by": "line"}))
    }
    assert len(digests) == 4


def test_reader_skips_and_counts(write_text):
    reader = TextReader([write_text("a.jsonl", ["fox", b"{", "dog", b"{}"])], "skip")
    assert list(reader) == ["fox", "dog"] and reader.bad_lines.count == 2
    with pytest.raises(UserError, match="a.jsonl:2: broken JSON"):
        list(TextReader(reader.files, "refuse"))
