"""Corpora that are there already: a manifest entry for Megatron .bin/.idx files, which stay as they are."""

import hashlib
import sys

import numpy as np

from megatron_lpr.config import SourceConfig
from megatron_lpr.data.indexed import IndexedCorpus
from megatron_lpr.data.language_runs import LanguageRuns
from megatron_lpr.data.manifest import Corpus, TokenizerRecord
from megatron_lpr.data.spot_check import with_checksums
from megatron_lpr.errors import UserError

_CHUNK = 1 << 22
_DOCUMENTS = 1 << 16


def existing_corpus(source: SourceConfig, tokenizer: TokenizerRecord) -> Corpus:
    """The entry of the corpus at `source.prefix`, every token, boundary and language of which is read and checked.

    Documents are not shuffled again. Says so where documents do not end with the end-of-document token.

    Raises:
        UserError: a file is missing or corrupt, or holds tokens that the tokenizer does not have.
    """
    assert source.prefix is not None
    corpus = IndexedCorpus(source.prefix)
    digest = _check_tokens(corpus, tokenizer)
    _check_documents(corpus, source.name, tokenizer.eod_id)
    language_digest = None
    if source.languages:
        runs = LanguageRuns(source.prefix, num_tokens=corpus.num_tokens, num_languages=len(source.languages))
        runs.check()
        with open(runs.path, "rb") as file:
            language_digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = Corpus(
        name=source.name,
        prefix=source.prefix,
        language=source.language,
        role=source.role,
        weight=float(source.weight),
        documents=corpus.num_documents,
        tokens=corpus.num_tokens,
        digest=digest,
        languages=dict(source.languages) or None,
        language_digest=language_digest,
    )
    return with_checksums(entry)


def _check_tokens(corpus: IndexedCorpus, tokenizer: TokenizerRecord) -> str:
    """SHA-256 of the .bin file, whose tokens must be the tokenizer's."""
    total = hashlib.sha256()
    for first in range(0, corpus.num_tokens, _CHUNK):
        tokens = np.ascontiguousarray(corpus.tokens[first : first + _CHUNK])
        if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
            wrong = int(np.flatnonzero((tokens < 0) | (tokens >= tokenizer.vocab_size))[0])
            raise UserError(
                f"{corpus.prefix}.bin was not made with the tokenizer {tokenizer.name}: token {first + wrong} is "
                f"{int(tokens[wrong])}, its vocabulary has {tokenizer.vocab_size}"
            )
        total.update(tokens.data)
    return total.hexdigest()


def _check_documents(corpus: IndexedCorpus, name: str, eod_id: int) -> None:
    without = 0
    for first in range(0, corpus.num_documents, _DOCUMENTS):
        bounds = corpus.boundaries(first, min(_DOCUMENTS, corpus.num_documents - first))
        full = bounds[1:] > bounds[:-1]
        without += int(np.count_nonzero(~full))
        without += int(np.count_nonzero(corpus.tokens[bounds[1:][full] - 1] != eod_id))
    if without:
        print(
            f"{name}: {without:,} of {corpus.num_documents:,} documents do not end with the end-of-document token "
            f"{eod_id}; where they end, windows run on without a mark",
            file=sys.stderr,
        )
