"""Documents of text files, and the lines that are none."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_lpr.data.text.text_files import Block, expand, parquet_file, read_blocks
from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import printable
from megatron_lpr.recipe.text_settings import Format, OnBadLine, PreprocessConfig, SampleBy, SourceConfig

_ROWS = 4096
_JSON_LINES = " (read as JSON lines, an object on each; `format` tells of another kind)"


class Document(NamedTuple):
    """A text, the place of its first byte (of a Parquet file: its row), the language a field names, bytes in UTF-8."""

    text: str
    file: int
    offset: int
    line: int
    language: str | None
    size: int


class BadLine(NamedTuple):
    """A line without a usable document; `reason` is one of a few, `detail` says more of this one."""

    path: str
    line: int
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}{self.detail}"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the files of a corpus become documents.

    languages: those that `language_field` may name; none: any. A document above `max_document_bytes` is a bad line; 0:
    no limit.
    """

    format: Format = "auto"
    text_field: str = "text"
    language_field: str | None = None
    languages: tuple[str, ...] = ()
    sample_by: SampleBy = "document"
    max_document_bytes: int = 0

    @classmethod
    def of(cls, source: SourceConfig, settings: PreprocessConfig) -> "Reading":
        """That of a corpus which is preprocessed."""
        return cls(
            format=source.format,
            text_field=source.text_field,
            language_field=source.language_field,
            languages=tuple(source.languages),
            sample_by=source.sample_by,
            max_document_bytes=settings.max_document_bytes,
        )


@dataclass
class BadLines:
    """Refuses bad lines, or counts them by reason and keeps the first of each; `setting` is what decides.

    Raises:
        UserError: from `add`, where bad lines are refused.
    """

    on_bad_line: OnBadLine
    setting: str = "on_bad_line"
    by_reason: dict[str, tuple[int, BadLine]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.by_reason.values())

    def add(self, bad: BadLine) -> None:
        if self.on_bad_line == "refuse":
            raise UserError(f"{bad}; correct it, or leave such lines out with {self.setting}: skip")
        count, first = self.by_reason.get(bad.reason, (0, bad))
        self.by_reason[bad.reason] = (count + 1, first)


class TextReader:
    """Iterates over the texts of `files` in order; `bad_lines` has those that were left out.

    Args:
        language: what the language field of the documents says, if it is not to be all of them.

    Raises:
        UserError: a file is missing, unreadable or incomplete; a bad line that is to be refused.
    """

    def __init__(
        self,
        files: Sequence[str],
        on_bad_line: OnBadLine,
        reading: Reading | None = None,
        *,
        setting: str = "on_bad_line",
        language: str | None = None,
    ):
        self.files = expand(files)
        self.reading = reading or Reading()
        self.bad_lines = BadLines(on_bad_line, setting)
        self._language = language

    def __iter__(self) -> Iterator[str]:
        for block in read_blocks(self.files, format=self.reading.format, sample_by=self.reading.sample_by):
            for document in documents_of(block, self.reading):
                if isinstance(document, BadLine):
                    self.bad_lines.add(document)
                elif self._language is None or document.language == self._language:
                    yield document.text


def documents_of(block: Block, reading: Reading) -> Iterator[Document | BadLine]:
    """The documents and bad lines of a block, in order. Blank lines hold no document and are passed over."""
    if block.format == "jsonl":
        return _json_lines(block, reading)
    if block.format == "parquet":
        return _rows(block, reading)
    return _texts(block, reading)


def _json_lines(block: Block, reading: Reading) -> Iterator[Document | BadLine]:
    for offset, line, data in _lines(block):
        try:
            # A byte-order mark may open a file; JSON itself has none.
            content = json.loads(data.decode("utf-8-sig" if offset == 0 else "utf-8"))
        except UnicodeDecodeError:
            yield BadLine(block.path, line, "invalid UTF-8")
        except (ValueError, RecursionError):
            yield BadLine(block.path, line, "broken JSON", "" if ".jsonl" in block.path else _JSON_LINES)
        else:
            if not isinstance(content, dict):
                yield BadLine(block.path, line, "no JSON object", _JSON_LINES)
                continue
            text = content.get(reading.text_field)
            language = content.get(reading.language_field) if reading.language_field else None
            yield _document(block, reading, text, language, offset, line, content)


def _rows(block: Block, reading: Reading) -> Iterator[Document | BadLine]:
    import pyarrow

    names = [name for name in (reading.text_field, reading.language_field) if name]
    file, row = parquet_file(block.path, names), block.offset
    try:
        for batch in file.iter_batches(_ROWS, row_groups=[block.row_group], columns=names):
            texts = _values(batch.column(reading.text_field))
            languages = _values(batch.column(reading.language_field)) if reading.language_field else [None] * len(texts)
            for text, language in zip(texts, languages, strict=True):
                if isinstance(text, UnicodeDecodeError) or isinstance(language, UnicodeDecodeError):
                    yield BadLine(block.path, row + 1, "invalid UTF-8")
                else:
                    yield _document(block, reading, text, language, row, row + 1)
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{block.path} is not a complete Parquet file: {' '.join(str(error).split())}") from error


def _values(column) -> list:
    """Values of a column; a UnicodeDecodeError where there was one, as Parquet does not check its strings."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values: list = []
        for scalar in column:
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError as error:
                values.append(error)
        return values


def _texts(block: Block, reading: Reading) -> Iterator[Document | BadLine]:
    assert block.data is not None
    pieces: Iterable[tuple[int, int, bytes]]
    if reading.sample_by == "document":
        pieces = [(block.offset, block.line, block.data)]
    else:
        pieces = _lines(block) if reading.sample_by == "line" else _paragraphs(block)
    for offset, line, data in pieces:
        if reading.sample_by == "line":
            data = data.removesuffix(b"\r")
        try:
            text = data.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            yield BadLine(block.path, line + data.count(b"\n", 0, error.start), "invalid UTF-8")
        else:
            yield _document(block, reading, text, None, offset, line)


def _lines(block: Block) -> Iterator[tuple[int, int, bytes]]:
    """(offset, line number, line) of lines that are not blank."""
    assert block.data is not None
    offset = block.offset
    for line, data in enumerate(block.data.split(b"\n"), start=block.line):
        if data and not data.isspace():
            yield offset, line, data
        offset += len(data) + 1


def _paragraphs(block: Block) -> Iterator[tuple[int, int, bytes]]:
    """(offset, number of the first line, lines) of runs of lines that are not blank."""
    run: list[bytes] = []
    start = (block.offset, block.line)
    following = block.line
    for offset, line, data in _lines(block):
        if run and line != following:
            yield *start, b"\n".join(run)
            run = []
        if not run:
            start = (offset, line)
        run.append(data.removesuffix(b"\r"))
        following = line + 1
    if run:
        yield *start, b"\n".join(run)


def _document(
    block: Block, reading: Reading, text: object, language: object, offset: int, line: int, names: Iterable[str] = ()
) -> Document | BadLine:
    """`names` are the fields of the line, for who has not told which is the text."""
    if not isinstance(text, str):
        there = textwrap.shorten(printable(f"; there is {', '.join(names)}"), 200) if names else ""
        detail = f"text_field says which it is{there}"
        if text is not None:
            detail = f"it is {type(text).__name__}; write it as text, or name another with text_field"
        return BadLine(block.path, line, f'no "{reading.text_field}" string', f" ({detail})")
    if not text.strip():
        return BadLine(block.path, line, "empty text")
    # JSON can spell half of a surrogate pair, which is no character and which no tokenizer accepts.
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return BadLine(block.path, line, "unpaired surrogate in the text")
    if 0 < reading.max_document_bytes < size:
        detail = f" (it has {size:,}; divide it, or raise preprocess.max_document_bytes)"
        return BadLine(block.path, line, f"document of more than {reading.max_document_bytes:,} bytes", detail)
    if reading.language_field is not None:
        if not isinstance(language, str):
            return BadLine(block.path, line, f'no "{reading.language_field}" string')
        if reading.languages and language not in reading.languages:
            return BadLine(block.path, line, "unknown language code", f" {language!r}")
        return Document(text, block.file, offset, line, language, size)
    return Document(text, block.file, offset, line, None, size)
