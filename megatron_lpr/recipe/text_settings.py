"""The sections of a recipe about raw text: what is tokenised, and what a model is evaluated on."""

from dataclasses import dataclass
from typing import Literal

from megatron_lpr.recipe.fields import opt, required

Format = Literal["auto", "jsonl", "parquet", "text"]
SampleBy = Literal["document", "paragraph", "line"]
OnBadLine = Literal["refuse", "skip"]
Engine = Literal["tokenizers", "fastokens"]
Bos = Literal["auto", "true", "false"]


@dataclass(frozen=True, kw_only=True)
class EvaluationCorpus:
    """Held-out text."""

    name: str = required("row of the table")
    files: tuple[str, ...] = required("text files of any kind that preprocess.corpora[].files knows; patterns too")
    language: str = required("language code")
    role: Literal["original", "expanded"] = required("whether the base model is meant to know the language")
    format: Format = opt("auto", "as preprocess.corpora[].format")
    text_field: str = opt("text", "field (column) of the text")
    language_field: str | None = opt(
        None, "field (column) that names each document's language; the documents in `language` alone are scored"
    )
    sample_by: SampleBy = opt("document", "as preprocess.corpora[].sample_by")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Bits per byte on held-out text."""

    corpora: tuple[EvaluationCorpus, ...] = opt((), "held-out corpora")
    window: int = opt(1024, "tokens of context window", at_least=1, at_most=1 << 31)
    batch: int = opt(8, "windows of one forward pass", at_least=1)
    max_bytes: int | None = opt(None, "bytes of text scored per corpus; without it all", at_least=1)
    on_bad_line: OnBadLine = opt("refuse", "what to do with a line that is no usable document")
    every: int = opt(0, "steps of training between validations, which the last step has too; 0: none", at_least=0)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Raw text of one corpus, or a corpus that is there already."""

    name: str = required("name of the corpus")
    files: tuple[str, ...] = opt(
        (), "JSONL, .txt (both also .gz, .zst, .bz2, .xz) or Parquet files; patterns as text/*.jsonl.gz"
    )
    prefix: str | None = opt(None, "in place of `files`: existing Megatron corpus, path without .bin")
    language: str = required("language code; of a corpus that mixes languages the one it counts as in the mixture")
    role: Literal["original", "expanded"] = required("`original`: the base model knows it; `expanded`: it is new")
    weight: float = opt(1.0, "share inside its role", above=0)
    format: Format = opt("auto", "`auto`: by the name, .parquet, .txt, else JSONL")
    text_field: str = opt("text", "field (column) of the text")
    sample_by: SampleBy = opt(
        "document", "what a document of a text file is: the file, lines up to a blank one, or a line"
    )
    languages: dict[str, str] = opt({}, "languages inside a corpus that mixes them, with their roles: {hu: expanded}")
    language_field: str | None = opt(None, "field (column) that names each document's language")
    tagger: str | None = opt(None, "your function module:function, from a sentence to its language code")
    sentence_splitter: Literal["nltk", "none"] = opt("nltk", "`none` gives the tagger whole documents")
    sentence_model: str = opt("english", "NLTK punkt model that divides documents into sentences for the tagger")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Raw text to Megatron .bin/.idx and a manifest."""

    output: str | None = opt(None, "folder of the .bin/.idx files and of manifest.yaml")
    tokenizer: str | None = opt(None, "tokenizer folder or SentencePiece file; without it the base model's")
    corpora: tuple[SourceConfig, ...] = opt((), "corpora to tokenise")
    on_bad_line: OnBadLine = opt("refuse", "what to do with a line that is no usable document")
    max_document_bytes: int = opt(
        16 << 20,
        "a longer document is a bad line (each MB of it takes 140 to 210 MB of memory); 0: no limit",
        at_least=0,
    )
    heldout: float = opt(
        0.0,
        "share of the documents, by a hash of their text, that goes to <name>.heldout.jsonl.gz for evaluation.corpora",
        at_least=0,
        below=1,
    )
    seed: int = opt(0, "seed of the document shuffle", at_least=0)
    workers: int = opt(0, "tokenising processes; 0 is one per core", at_least=0, at_most=1024)
    engine: Engine = opt(
        "tokenizers", "what reads tokenizer.json: fastokens gives the same tokens faster (megatron-lpr[fast])"
    )
    bos: Bos = opt(
        "auto", "a BOS token opens each document, of evaluation too; auto: where the tokenizer itself puts one first"
    )
    parse_special_tokens: bool = opt(
        False, "<|im_end|> and the like, written out in a text, become control tokens, in evaluation too"
    )
