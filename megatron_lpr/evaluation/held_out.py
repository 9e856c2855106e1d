"""Held-out text, read as preprocessing reads its text; all of it, and every setting, before a model is loaded."""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_lpr.data.corpus.manifest import Corpus, Manifest, check_language_roles
from megatron_lpr.data.text.documents import Reading, TextReader
from megatron_lpr.data.text.source_checks import check_files, way_of_reading
from megatron_lpr.data.text.text_files import expand, files_sha256, format_of
from megatron_lpr.data.text.tokenize import Tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.windows import Text, tokenized
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.recipe.sections import check_section
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.recipe.text_settings import EvaluationConfig, EvaluationCorpus, OnBadLine, SourceConfig

_ON_BAD_LINE = "evaluation.on_bad_line"


def check_evaluation(settings: EvaluationConfig, model_dir: str) -> None:
    """Check everything that needs no reading of text, for the model in `model_dir`.

    Raises:
        UserError: no corpora, a size out of range, a file that is not there or there twice, a setting without effect,
            a language with two roles.
    """
    if not settings.corpora:
        raise UserError("evaluation.corpora: empty; list held-out corpora")
    check_window(settings, model_dir)
    names = Counter(corpus.name for corpus in settings.corpora)
    for corpus in settings.corpora:
        if names[corpus.name] > 1:
            raise UserError(f"evaluation.corpora: two are called '{corpus.name}'; give each its own name")
        _check_corpus(corpus)
    check_files([dataclasses.replace(corpus, files=tuple(_files(corpus))) for corpus in settings.corpora])
    check_language_roles("evaluation.corpora", ((c.name, c.language, c.role) for c in settings.corpora))


def check_window(settings: EvaluationConfig, model_dir: str) -> None:
    """Raises UserError for a number out of its range, and for a window longer than the model in `model_dir` takes."""
    check_section(settings, "evaluation")
    positions = _positions(model_dir)
    if positions is not None and settings.window > positions:
        raise UserError(
            f"evaluation.window: {settings.window}, but the model in {model_dir} has {positions} positions "
            f"(max_position_embeddings); choose {positions} at most"
        )


def read_held_out(settings: EvaluationConfig, tokenizer: Tokenizer) -> list[Text]:
    """All corpora as tokens. UserError as `read_corpus`, and where documents have no characters."""
    return [
        tokenized(tokenizer, corpus, read_corpus(corpus, settings.on_bad_line), settings.max_bytes)
        for corpus in settings.corpora
    ]


def read_corpus(corpus: EvaluationCorpus, on_bad_line: OnBadLine = "refuse") -> list[str]:
    """The documents of a held-out corpus in file order; says what was left out.

    Raises:
        UserError: a missing or unreadable file, a bad line that is to be refused, no document in any of the files.
    """
    fields = ("format", "text_field", "language_field", "sample_by")
    reading = Reading(**{name: getattr(corpus, name) for name in fields})
    language = corpus.language if corpus.language_field else None
    reader = TextReader(_files(corpus), on_bad_line, reading, setting=_ON_BAD_LINE, language=language)
    documents = list(reader)
    for reason, (count, first) in reader.bad_lines.by_reason.items():
        where = f"the first at {first.path}:{first.line}"
        print(f"evaluate {corpus.name}: left out {count:,} lines ({reason}), {where}", file=sys.stderr)
    if not documents:
        whose = f" whose {corpus.language_field} is '{language}'" if language else ""
        files = ", ".join(corpus.files)
        raise UserError(
            f"evaluation corpus {corpus.name}: no text in {files}{whose}; name other files, or leave it out"
        )
    return documents


def doubts(recipe: Recipe) -> Iterator[str]:
    """A warning for each held-out corpus whose score says something else than it seems: as it is training text too, or
    text in several languages, as far as the recipe and its manifest tell."""
    sources = {os.path.realpath(file): source.name for source in recipe.preprocess.corpora for file in _there(source)}
    trained = _trained(recipe)
    digests = {corpus.source.sha256: corpus.name for corpus in trained if corpus.source}
    mixed = {os.path.realpath(c.held_out_file): ", ".join(c.languages) for c in trained if c.languages}
    for corpus in recipe.evaluation.corpora:
        where = f"evaluation.corpora: {corpus.name}"
        files = _files(corpus)
        if shared := next((file for file in files if os.path.realpath(file) in sources), None):
            source = sources[os.path.realpath(shared)]
            yield f"{where}: {shared} is training text too, of preprocess.corpora {source}; its score says little"
        elif digests and (name := digests.get(files_sha256(files, _way_of_reading(corpus, recipe)))):
            yield f"{where}: has the very text that corpus {name} of the manifest was made from; its score says little"
        elif not corpus.language_field and (file := next((f for f in files if os.path.realpath(f) in mixed), None)):
            yield (
                f"{where}: {file} has documents in several languages ({mixed[os.path.realpath(file)]}), all scored as "
                f"{corpus.language}; with language_field: language those that say so alone are"
            )


def _there(source: SourceConfig) -> Sequence[str]:
    try:
        return expand(source.files)
    except UserError:
        return ()  # evaluation needs no training text


def _trained(recipe: Recipe) -> Sequence[Corpus]:
    """The corpora of the manifest."""
    try:
        return Manifest.load(recipe.data.manifest, check_files=False).corpora if recipe.data else ()
    except UserError:
        return ()  # nor a manifest


def _way_of_reading(corpus: EvaluationCorpus, recipe: Recipe) -> dict[str, object]:
    fields = ("name", "files", "language", "role", "format", "text_field", "sample_by")
    source = SourceConfig(**{field: getattr(corpus, field) for field in fields})
    return way_of_reading(source, recipe.preprocess)


def _check_corpus(corpus: EvaluationCorpus) -> None:
    where = f"evaluation.corpora: {corpus.name}"
    if not corpus.files:
        raise UserError(f"{where}: names no text files")
    formats = {format_of(file, corpus.format) for file in _files(corpus)}
    if formats == {"text"} and (corpus.text_field, corpus.language_field) != ("text", None):
        raise UserError(f"{where}: is plain text, which has no fields; remove text_field and language_field")
    if "text" not in formats and corpus.sample_by != "document":
        raise UserError(f"{where}: sets sample_by, which has an effect on plain text only")


def _files(corpus: EvaluationCorpus) -> Sequence[str]:
    try:
        return expand(corpus.files)
    except UserError as error:
        raise UserError(f"evaluation.corpora: {corpus.name}: {error}") from None


def _positions(model_dir: str) -> int | None:
    """Positions of any Hugging Face model; None where its config.json does not tell, or is yet to be looked at."""
    if not (Path(model_dir) / "config.json").is_file():
        return None
    value = read_config(model_dir).get("max_position_embeddings")
    return value if isinstance(value, int) else None
