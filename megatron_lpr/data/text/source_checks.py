"""What can be wrong with the sources of corpora, found before anything is written."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence

from megatron_lpr.data.corpus.indexed import MAX_LANGUAGES
from megatron_lpr.data.text.sentence_tagger import SentenceTagger
from megatron_lpr.data.text.text_files import check_compression, format_of, parquet_file
from megatron_lpr.errors import UserError, warn
from megatron_lpr.recipe.sections import check_section
from megatron_lpr.recipe.text_settings import EvaluationCorpus, PreprocessConfig, SourceConfig


def check_sources(settings: PreprocessConfig) -> None:
    """Checks names, ranges, and settings that contradict each other or have no effect.

    Raises:
        UserError: naming the corpus.
    """
    if not settings.corpora:
        raise UserError("no corpora to preprocess: name at least one")
    check_section(settings, "preprocess")
    names = set()
    for source in settings.corpora:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", source.name):
            raise UserError(f"corpus name '{source.name}' is no file name: use letters, digits and . _ -")
        if source.name in names:
            raise UserError(f"two corpora are called '{source.name}'; give each its own name")
        names.add(source.name)
        for problem in _contradictions(source):
            raise UserError(f"corpus '{source.name}' {problem}")
    if settings.heldout:
        _check_held_out(settings)


def _check_held_out(settings: PreprocessConfig) -> None:
    existing = [source.name for source in settings.corpora if source.prefix is not None]
    if len(existing) == len(settings.corpora):
        raise UserError(
            f"preprocess.heldout: {settings.heldout}; has no effect on corpora that exist already (prefix); set it "
            "where they are made from text"
        )
    if existing:
        warn(f"preprocess.heldout: nothing is held out of {', '.join(existing)}, which exist already (prefix)")


def _contradictions(source: SourceConfig) -> Iterator[str]:
    if source.prefix is not None and source.files:
        yield "has both a prefix and files; a corpus that exists is not made again"
    if source.prefix is None and not source.files:
        yield "names no text files"
    tells_language = source.language_field is not None or source.tagger is not None
    if source.language_field is not None and source.tagger is not None:
        yield "has both a language_field and a tagger; one of them names the languages"
    if tells_language and source.prefix is not None:
        yield "has a prefix, so that its languages are in its .lang file; remove language_field and tagger"
    if tells_language and not source.languages:
        yield "has languages inside it; list them with their roles, as languages: {hu: expanded, en: original}"
    if source.languages and not tells_language and source.prefix is None:
        yield "lists languages, but neither a language_field nor a tagger says which text is in which"
    if len(source.languages) > MAX_LANGUAGES:
        yield f"lists {len(source.languages)} languages; a .lang file holds {MAX_LANGUAGES}"
    if source.tagger is None and (source.sentence_splitter, source.sentence_model) != ("nltk", "english"):
        yield "sets sentence_splitter or sentence_model, which have no effect without a tagger"
    formats = {format_of(file, source.format) for file in source.files}
    if formats == {"text"} and (source.text_field, source.language_field) != ("text", None):
        yield "is plain text, which has no fields; remove text_field and language_field"
    if formats and "text" not in formats and source.sample_by != "document":
        yield "sets sample_by, which has an effect on plain text only"


def check_files(corpora: Sequence[SourceConfig | EvaluationCorpus]) -> None:
    """Looks for files that are there twice, under whatever names; the sources' patterns are replaced by paths.

    Warns of a file in two corpora, but for those that are evaluated on its documents in one language each.

    Raises:
        UserError: a file twice in one corpus, or of a kind that is not read.
    """
    corpus_of: dict[tuple[int, int, str | None], str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for source in corpora:
        paths: dict[tuple[int, int], str] = {}
        for path in source.files:
            check_compression(path)
            file = os.stat(path)
            identity = (file.st_dev, file.st_ino)
            if identity in paths:
                also = f", also as {paths[identity]}" if paths[identity] != path else ""
                raise UserError(f"corpus '{source.name}' reads {path} twice{also}; list it once")
            paths[identity] = path
            of_one = isinstance(source, EvaluationCorpus) and source.language_field is not None
            part = (*identity, source.language if of_one else None)
            if corpus_of.setdefault(part, source.name) != source.name:
                shared.setdefault((corpus_of[part], source.name), []).append(path)
    for (name, other), both in shared.items():
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        warn(f"corpora '{name}' and '{other}' both read {both[0]}{more}")


def check_plug_ins(source: SourceConfig) -> None:
    """Finds a missing plug-in, library or column before hours of work do. UserError names it."""
    if source.tagger is not None:
        SentenceTagger(source)
    for path in source.files:
        if format_of(path, source.format) == "parquet":
            parquet_file(path, filter(None, (source.text_field, source.language_field)))


def way_of_reading(source: SourceConfig, settings: PreprocessConfig) -> dict[str, object]:
    """What, beside the bytes of the files, decides the tokens and their languages: all that is no default."""
    fields = ("format", "text_field", "language_field", "sample_by", "tagger", "sentence_splitter", "sentence_model")
    defaults = {field.name: field.default for field in dataclasses.fields(SourceConfig)}
    way = {name: getattr(source, name) for name in fields if getattr(source, name) != defaults[name]}
    for name in ("max_document_bytes", "heldout"):
        if getattr(settings, name) != getattr(PreprocessConfig, name):
            way[name] = getattr(settings, name)
    return way | ({"languages": list(source.languages)} if source.languages else {})
