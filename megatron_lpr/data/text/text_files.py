"""Text files on disk, cut into blocks of whole documents in bounded memory.

    JSONL, plain text, each also as .gz, .zst, .bz2 or .xz  --decompress, cut at line ends-->  Block of bytes
    Parquet                                                 --row groups, by number-->         Block without bytes

A block says where its documents lie, so that a worker can name the line of a bad one, and so that a document has
a place (file, offset) that depends on nothing but the files.
"""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_lpr.errors import UserError
from megatron_lpr.files.cores import usable_cores
from megatron_lpr.files.digest import file_sha256
from megatron_lpr.files.unexpanded import refuse_unexpanded
from megatron_lpr.recipe.text_settings import Format, SampleBy

BLOCK_BYTES = 16 << 20
LONGEST_DOCUMENT = 128 << 20
_READ_BYTES = 1 << 18
_COMPRESSED = re.compile(r"\.(gz|zst|bz2|xz)$")
_UNREAD = re.compile(r"\.(zip|7z|rar|lz4|lzo|br|Z|tar|tgz|tbz2?|txz|tar\.\w+)$")
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some documents of one file.

    Attributes:
        file, path: number of the file among its corpus' files, and its path.
        format: jsonl, text or parquet.
        offset: position of the block in the decompressed file, in bytes; of a Parquet file its first row.
        line: number of its first line (row), from 1.
        data: the bytes; None for Parquet, whose row group `row_group` the reader of the block opens itself.
        position: bytes of all files read so far, as they lie on disk, for progress.
    """

    file: int
    path: str
    format: str
    offset: int
    line: int
    data: bytes | None
    row_group: int = 0
    position: int


def expand(files: Sequence[str]) -> tuple[str, ...]:
    """Paths in order, shell patterns (text/hu/*.jsonl.gz) replaced by what they match, sorted.

    Raises:
        UserError: a file that is not there, or a pattern that matches none.
    """
    paths: list[str] = []
    for file in files:
        found = [file] if os.path.isfile(file) else sorted(filter(os.path.isfile, glob.glob(file, recursive=True)))
        if not found:
            refuse_unexpanded(file)
            pattern = (
                f", which is a folder; name files in it, as {os.path.join(file, '*')}" if os.path.isdir(file) else ""
            )
            raise UserError(f"no file {file}{pattern}")
        paths += found
    return tuple(paths)


def format_of(path: str, wanted: Format = "auto") -> str:
    """jsonl, text or parquet, by the file's name where `wanted` is auto; any unknown name is JSONL."""
    if wanted != "auto":
        return wanted
    name = _COMPRESSED.sub("", path)
    return "text" if name.endswith(".txt") else "parquet" if name.endswith(".parquet") else "jsonl"


def check_compression(path: str) -> None:
    """Raises UserError for archives and compressions that are not read."""
    found = _UNREAD.search(path)
    if found:
        raise UserError(f"{path}: {found[0]} files are not read; unpack it, or compress it as .gz, .zst, .bz2 or .xz")


def files_sha256(files: Sequence[str], settings: dict[str, Any] | None = None) -> str:
    """SHA-256 over the files' own SHA-256 sums, in order, and over `settings` where there are any; hexadecimal."""
    with ThreadPoolExecutor(usable_cores()) as threads:
        total = hashlib.sha256(b"".join(map(bytes.fromhex, threads.map(file_sha256, files))))
    if settings:
        total.update(json.dumps(settings, sort_keys=True).encode())
    return total.hexdigest()


def read_blocks(
    files: Sequence[str],
    *,
    format: Format = "auto",
    sample_by: SampleBy = "document",
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """Cuts `files` into blocks of about `block_bytes`, the same ones each time, holding one at a time.

    Args:
        sample_by: what a document of a text file is (a word of Hugging Face's text loader): the whole file, a
            paragraph (lines up to a blank one) or a line.

    Raises:
        UserError: a file is unreadable or incomplete, or holds a document above LONGEST_DOCUMENT bytes.
    """
    finished = 0
    for number, path in enumerate(files):
        kind = format_of(path, format)
        try:
            if kind == "parquet":
                yield from _row_groups(number, path, finished)
            else:
                yield from _cut_file(number, path, kind, sample_by, block_bytes, finished)
            finished += os.path.getsize(path)
        except OSError as error:
            raise UserError(f"cannot read the text file {path}: {error.strerror or error}") from error


def parquet_file(path: str, columns: Iterable[str] = ()) -> Any:
    """pyarrow's ParquetFile. UserError where pyarrow is missing, the file is none, or it lacks one of `columns`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'megatron-lpr[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a complete Parquet file: {' '.join(str(error).split())}") from error
    for name in columns:
        if name not in file.schema_arrow.names:
            raise UserError(f"{path} has no column '{name}'; it has {', '.join(file.schema_arrow.names)}")
        if file.schema_arrow.names.count(name) > 1:
            raise UserError(f"{path} has several columns '{name}'; write it with one of that name")
    return file


def _row_groups(number: int, path: str, finished: int) -> Iterator[Block]:
    metadata = parquet_file(path).metadata
    row, size = 0, os.path.getsize(path)
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        position = finished + size * (row + rows) // max(metadata.num_rows, 1)
        yield Block(
            file=number, path=path, format="parquet", offset=row, line=row + 1, data=None, row_group=group,
            position=position,
        )  # fmt: skip
        row += rows


def _cut_file(
    number: int, path: str, kind: str, sample_by: SampleBy, block_bytes: int, finished: int
) -> Iterator[Block]:
    end_of = _end_of_lines
    if kind == "text" and sample_by != "line":
        end_of = _end_of_paragraphs if sample_by == "paragraph" else _never
    with open(path, "rb") as raw:
        offset, line = 0, 1
        for data in _cut(_decompressed(raw, path, min(_READ_BYTES, block_bytes)), end_of, block_bytes, path):
            yield Block(
                file=number, path=path, format=kind, offset=offset, line=line, data=data,
                position=finished + raw.tell(),
            )  # fmt: skip
            offset += len(data)
            line += data.count(b"\n")


def _cut(
    chunks: Iterator[bytes], end_of: Callable[[bytearray, int], int], block_bytes: int, path: str
) -> Iterator[bytes]:
    """Pieces of at least `block_bytes` that end where a document does."""
    buffer, searched = bytearray(), 0
    for chunk in chunks:
        buffer += chunk
        if len(buffer) < block_bytes:
            continue
        end = end_of(buffer, searched)
        if end > 0:
            with memoryview(buffer) as view:
                data = bytes(view[:end])
            del buffer[:end]
            yield data
        elif len(buffer) > LONGEST_DOCUMENT:
            raise UserError(
                f"{path} holds a document of more than {LONGEST_DOCUMENT >> 20} MiB; divide it "
                "(a text file with sample_by: paragraph or line)"
            )
        searched = 0 if end > 0 else len(buffer)
    if buffer or end_of is _never:  # an empty file is an empty document
        yield bytes(buffer)


def _end_of_lines(buffer: bytearray, searched: int) -> int:
    return buffer.rfind(b"\n", searched) + 1


def _end_of_paragraphs(buffer: bytearray, searched: int) -> int:
    """Position after the last blank line. A blank line may straddle what was searched before: look back a little."""
    last = 0
    for match in _BLANK_LINE.finditer(buffer, max(searched - 1024, 0)):
        last = match.end()
    return last


def _never(buffer: bytearray, searched: int) -> int:
    return 0


def _decompressed(raw: BinaryIO, path: str, size: int) -> Iterator[bytes]:
    """The bytes of an open file, some at a time, about `size` where it is up to us.

    Raises:
        UserError: the file is empty, incomplete, damaged, or not of the kind that its name says.
    """
    kind = path.rpartition(".")[2]
    if kind not in ("gz", "zst", "bz2", "xz"):
        yield from iter(lambda: raw.read(size), b"")
        return
    if os.fstat(raw.fileno()).st_size == 0:
        raise UserError(f"{path} is empty, not even a compressed file of nothing; write it again, or leave it out")
    if kind == "gz":
        try:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield from iter(lambda: unpacked.read(size), b"")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is not a complete gzip file: {error}") from error
    elif kind == "bz2":
        yield from _frames(raw, path, "bzip2", bz2.BZ2Decompressor, OSError)
    elif kind == "xz":
        yield from _frames(raw, path, "xz", lzma.LZMADecompressor, lzma.LZMAError, padding=b"\0")
    else:
        import zstandard

        # Windows up to 2 GiB are `zstd --long=31`.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        yield from _frames(raw, path, "zstd", decompressor.decompressobj, zstandard.ZstdError)


def _frames(
    raw: BinaryIO, path: str, kind: str, new: Callable[[], Any], failure: type[Exception], padding: bytes = b""
) -> Iterator[bytes]:
    """Frames one after the other. The libraries' own file objects end at a cut-off frame, or at what follows a complete
    one and is none, as if all were well."""
    frame, started = new(), False
    for chunk in iter(lambda: raw.read(io.DEFAULT_BUFFER_SIZE), b""):
        while chunk:
            if not started:
                chunk = chunk.lstrip(padding) if padding else chunk
                if not chunk:
                    break
            try:
                data, started = frame.decompress(chunk), True
            except failure as error:
                raise UserError(f"{path} is not a complete {kind} file: {error}") from error
            if data:
                yield data
            chunk = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, started = new(), False
    if started:
        raise UserError(f"{path} is not a complete {kind} file: it ends inside a frame")
