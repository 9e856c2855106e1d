"""The manifest: a YAML file that says which corpora there are, in which language and role, with which weight.

tokenizer: {name: SmolLM2-135M, vocab_size: 49152, sha256: 9ca9..., eod_id: 2, parse_special_tokens: false}
corpora:
- name: hu
  prefix: hu            # hu.bin and hu.idx, relative to the manifest
  language: hu
  role: expanded        # or original
  weight: 1.0           # share among the corpora of the same role
  documents: 1042
  tokens: 861213
  digest: 5f1d...       # SHA-256 of hu.bin
  index_digest: 77c0... # SHA-256 of hu.idx
  spot_digests: {bin: 90ab..., idx: 1c2d...}   # of some blocks of each file (spot_check.py)
  languages: {hu: expanded, en: original}   # where hu.lang says which tokens are in which; with language_digest
  heldout: {share: 0.001, documents: 2, bytes: 3120, digest: 0d7e...}   # hu.heldout.jsonl.gz
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lpr._replay_sampler import LanguageRuns
from megatron_lpr.data.corpus.indexed import MAX_LANGUAGES, IndexedCorpus
from megatron_lpr.data.corpus.yaml_records import check_keys, read_record
from megatron_lpr.errors import UserError, nearest
from megatron_lpr.files import durable
from megatron_lpr.files.unexpanded import refuse_unexpanded
from megatron_lpr.files.yaml_io import dump_yaml, read_yaml

ROLES = ("expanded", "original")
HELD_OUT = "heldout.jsonl.gz"  # suffix of a corpus' held-out documents


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer that wrote the corpora, all in the same way.

    `sha256` is that of its tokenizer.json or .model file. `bos_id` opens every document, None: nothing does.
    `parse_special_tokens` says that control tokens written out in a text became those tokens.
    """

    name: str
    vocab_size: int
    sha256: str
    eod_id: int
    bos_id: int | None = None
    parse_special_tokens: bool


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """What a corpus was made from: SHA-256 of the text files, seed of the shuffle, bad lines left out."""

    sha256: str
    seed: int
    skipped_lines: int


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Documents that were left out of a corpus, to evaluate on.

    `share` is the one that was asked for, `bytes` those of the text in UTF-8, `digest` the SHA-256 of the file.
    """

    share: float
    documents: int
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One corpus; `prefix` is its path without .bin, `weight` its share within its role.

    `language` and `role` say which part of the mixture it belongs to. A corpus that mixes languages has a file
    `prefix`.lang (csrc/languages.h), which numbers them in the order of `languages`, a mapping to their roles;
    `language_digest` is that file's SHA-256, `digest` and `index_digest` those of .bin and .idx,
    `spot_digests` those of some blocks of each file (spot_check.py), by suffix.
    """

    name: str
    prefix: str
    language: str
    role: str
    weight: float = 1.0
    documents: int
    tokens: int
    digest: str
    index_digest: str
    spot_digests: dict[str, str]
    source: TextSource | None = None
    languages: dict[str, str] | None = None
    language_digest: str | None = None
    heldout: HeldOut | None = None

    @property
    def held_out_file(self) -> str:
        """Where its held-out documents lie, if it has any."""
        return f"{self.prefix}.{HELD_OUT}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Corpora and the tokenizer that wrote them.

    Raises:
        UserError: two corpora of one name, or a language with two roles.
    """

    path: str
    tokenizer: TokenizerRecord
    corpora: tuple[Corpus, ...]

    def __post_init__(self):
        names = set()
        for corpus in self.corpora:
            if corpus.name in names:
                raise UserError(f"{self.path}: two corpora are called '{corpus.name}'; give each its own name")
            names.add(corpus.name)
        check_language_roles(self.path, (triple for corpus in self.corpora for triple in language_roles(corpus)))

    @cached_property
    def languages(self) -> tuple[str, ...]:
        """Languages in order of first appearance; a language tag is an index into these, plus one."""
        return tuple(self.language_roles)

    @cached_property
    def language_roles(self) -> dict[str, str]:
        """Role of each language: those of the corpora, and those inside corpora that mix languages.

        Every step asks for them, and there may be thousands of corpora.
        """
        own = {corpus.language: corpus.role for corpus in self.corpora}
        inside = {language: role for corpus in self.corpora for language, role in (corpus.languages or {}).items()}
        return own | {language: role for language, role in inside.items() if language not in own}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides what a run reads; independent of where the files lie."""
        tokenizer = (self.tokenizer.vocab_size, self.tokenizer.sha256, self.tokenizer.eod_id)
        corpora = [
            (c.name, c.language, c.role, float(c.weight), c.tokens, c.digest)
            + ((list(c.languages.items()), c.language_digest) if c.languages else ())
            for c in self.corpora
        ]
        return hashlib.sha256(json.dumps([tokenizer, corpora]).encode()).hexdigest()

    @staticmethod
    def load(path: str, *, check_files: bool = True) -> "Manifest":
        """Reads a manifest and, unless told not to, checks every entry against its files' sizes.

        Raises:
            UserError: no such file, not YAML, an unknown or missing key, a bad value, no corpora, or a
                corpus whose files are missing, corrupt or of another size than the manifest says.
        """
        content = _read_yaml(path)
        check_keys(content, {"tokenizer", "corpora"}, {"tokenizer", "corpora"}, path)
        tokenizer = _tokenizer(content["tokenizer"], f"{path}: tokenizer")
        entries = content["corpora"]
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{path} lists no corpora; add one with 'megatron-lpr preprocess'")
        corpora = tuple(_corpus(entry, path, number) for number, entry in enumerate(entries, start=1))
        manifest = Manifest(path=path, tokenizer=tokenizer, corpora=corpora)
        if check_files:
            for corpus in manifest.corpora:
                manifest.check_files(corpus)
        return manifest

    def check_files(self, corpus: Corpus) -> None:
        """Raises UserError where a corpus' files are missing, corrupt, or not as large as its entry says."""
        files = IndexedCorpus(corpus.prefix)
        for count, actual in (("documents", files.num_documents), ("tokens", files.num_tokens)):
            stated = getattr(corpus, count)
            if stated != actual:
                raise UserError(
                    f"{self.path}: corpus '{corpus.name}' has {stated} {count} in the manifest but {actual} "
                    f"in {corpus.prefix}.bin; preprocess it again"
                )

        if corpus.languages:
            LanguageRuns(corpus.prefix, num_tokens=files.num_tokens, num_languages=len(corpus.languages))

    def with_corpora(self, corpora: Iterable[Corpus]) -> "Manifest":
        """The same manifest with entries replaced (found by name) or appended."""
        entries = {corpus.name: corpus for corpus in (*self.corpora, *corpora)}
        return dataclasses.replace(self, corpora=tuple(entries.values()))

    def save(self) -> None:
        """Writes the manifest to `path`; readers see the old file or the new one, never half of one.

        Raises:
            UserError: the file cannot be written.
        """
        entries = []
        for corpus in self.corpora:
            entry = dataclasses.asdict(corpus)
            entry["prefix"] = os.path.relpath(corpus.prefix, os.path.dirname(self.path) or ".")
            for optional in ("source", "languages", "language_digest", "heldout"):
                if entry[optional] is None:
                    del entry[optional]
            entries.append(entry)
        tokenizer = {key: value for key, value in dataclasses.asdict(self.tokenizer).items() if value is not None}
        content = {"tokenizer": tokenizer, "corpora": entries}
        try:
            durable.write_text(Path(self.path), dump_yaml(content))
        except OSError as error:
            raise UserError(f"cannot write the manifest {self.path}: {error.strerror}") from error


def language_roles(corpus: Any) -> Iterator[tuple[str, str, str]]:
    """(name, language, role) of a corpus (or the source of one), and of each language inside it."""
    yield corpus.name, corpus.language, corpus.role
    for language, role in (corpus.languages or {}).items():
        yield corpus.name, language, role


def check_language_roles(where: str, corpora: Iterable[tuple[str, str, str]]) -> None:
    """Checks (name, language, role) triples: known roles, and one role per language.

    Raises:
        UserError: naming the corpus at fault.
    """
    role_of: dict[str, tuple[str, str]] = {}
    for name, language, role in corpora:
        if role not in ROLES:
            raise UserError(f"{where}: corpus '{name}' has the unknown role '{role}'{nearest(role, ROLES)}")
        first_name, first_role = role_of.setdefault(language, (name, role))
        if role != first_role:
            raise UserError(
                f"{where}: language '{language}' is {first_role} in corpus '{first_name}' and {role} in "
                f"'{name}'; a language has one role"
            )


def _read_yaml(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        refuse_unexpanded(path)
        raise UserError(f"no manifest at {path}; make one with 'megatron-lpr preprocess'")
    content = read_yaml(path, f"cannot read the manifest {path}")
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a manifest: expected the keys 'tokenizer' and 'corpora'")
    return content


def _tokenizer(entry: Any, where: str) -> TokenizerRecord:
    tokenizer = read_record(TokenizerRecord, entry, where)
    if not 0 < tokenizer.vocab_size <= 1 << 31:
        raise UserError(f"{where}: vocab_size must be in [1, 2^31], not {tokenizer.vocab_size}")
    for name in ("eod_id", "bos_id"):
        token = getattr(tokenizer, name)
        if token is not None and not 0 <= token < tokenizer.vocab_size:
            raise UserError(f"{where}: {name} must be a token of the {tokenizer.vocab_size} there are, not {token}")
    return tokenizer


def _corpus(entry: Any, path: str, number: int) -> Corpus:
    name = entry.get("name") if isinstance(entry, dict) else None
    where = f"{path}: corpus '{name}'" if name else f"{path}: corpus {number}"
    corpus = read_record(Corpus, entry, where)
    if not (math.isfinite(corpus.weight) and corpus.weight > 0):
        raise UserError(f"{where}: weight must be a positive number, not {corpus.weight}")
    for field in ("documents", "tokens"):
        if getattr(corpus, field) < 1:
            raise UserError(f"{where}: {field} must be at least 1, not {getattr(corpus, field)}")
    if corpus.source is not None and min(corpus.source.seed, corpus.source.skipped_lines) < 0:
        raise UserError(f"{where}: seed and skipped_lines of its source must not be negative")
    out = corpus.heldout
    if out is not None and not (0 < out.share < 1 and min(out.documents, out.bytes) >= 0):
        raise UserError(f"{where}: heldout must have a share between 0 and 1, and no negative counts")
    for field, suffix, digest in (
        ("digest", "bin", corpus.digest),
        ("index_digest", "idx", corpus.index_digest),
        ("language_digest", "lang", corpus.language_digest),
        ("heldout: digest", HELD_OUT, out.digest if out else None),
    ):
        if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"{where}: {field} must be the SHA-256 of its .{suffix} file, 64 hexadecimal digits")
    if (corpus.languages is None) != (corpus.language_digest is None):
        raise UserError(f"{where}: languages and language_digest belong together; it has one of them")
    suffixes = ["bin", "idx", *["lang"] * (corpus.languages is not None)]
    check_keys(corpus.spot_digests, suffixes, suffixes, f"{where}: spot_digests")
    if corpus.languages is not None and not 0 < len(corpus.languages) <= MAX_LANGUAGES:
        raise UserError(f"{where}: languages must name 1 to {MAX_LANGUAGES} languages")
    return dataclasses.replace(corpus, prefix=os.path.join(os.path.dirname(path), corpus.prefix))
