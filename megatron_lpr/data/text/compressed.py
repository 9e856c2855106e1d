"""Compressed files as a stream of bytes, in bounded memory; one that is cut off, or is something else, is refused."""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from megatron_lpr.errors import UserError

_UNREAD = re.compile(r"\.(zip|7z|rar|lz4|lzo|br|Z|tar|tgz|tbz2?|txz|tar\.\w+)$")


def without_suffix(path: str) -> str:
    """The name of the file inside."""
    return re.sub(r"\.(gz|zst|bz2|xz)$", "", path)


def check_compression(path: str) -> None:
    """Raises UserError for archives and compressions that are not read."""
    found = _UNREAD.search(path)
    if found:
        raise UserError(f"{path}: {found[0]} files are not read; unpack it, or compress it as .gz, .zst, .bz2 or .xz")


def decompressed(raw: BinaryIO, path: str, size: int) -> Iterator[bytes]:
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
