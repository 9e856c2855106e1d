"""Corpora that are there already: a manifest entry for Megatron .bin/.idx files, which stay as they are."""

import hashlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from megatron_lpr._replay_sampler import LanguageRuns
from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import Corpus, TokenizerRecord
from megatron_lpr.data.corpus.spot_check import spot_digests
from megatron_lpr.errors import UserError
from megatron_lpr.files.digest import file_sha256
from megatron_lpr.recipe.text_settings import SourceConfig

_CHUNK = 1 << 22
_DOCUMENTS = 1 << 16


def existing_corpus(source: SourceConfig, tokenizer: TokenizerRecord) -> Corpus:
    """The entry of the corpus at `source.prefix`, every token, boundary and language of which is read and checked.

    Documents are not shuffled again. Says so where documents do not end with the end-of-document token, or open
    otherwise than the manifest's other documents.

    Raises:
        UserError: a file is missing or corrupt, holds tokens that the tokenizer does not have, or not one document
            that opens with the BOS token.
    """
    assert source.prefix is not None
    if not Path(f"{source.prefix}.idx").is_file():
        what = "a prefix is the path of both files without .bin and .idx"
        raise UserError(f"corpus '{source.name}': there is no {source.prefix}.idx; {what}")
    corpus = IndexedCorpus(source.prefix)
    digest = _check_tokens(corpus, tokenizer)
    _check_documents(corpus, source.name, tokenizer)
    language_digest = None
    if source.languages:
        runs = LanguageRuns(source.prefix, num_tokens=corpus.num_tokens, num_languages=len(source.languages))
        runs.check()
        language_digest = file_sha256(runs.path)
    return Corpus(
        name=source.name,
        prefix=source.prefix,
        language=source.language,
        role=source.role,
        weight=float(source.weight),
        documents=corpus.num_documents,
        tokens=corpus.num_tokens,
        digest=digest,
        index_digest=file_sha256(f"{source.prefix}.idx"),
        spot_digests=spot_digests(source.prefix, digest, languages=language_digest is not None),
        languages=dict(source.languages) or None,
        language_digest=language_digest,
    )


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


def _check_documents(corpus: IndexedCorpus, name: str, tokenizer: TokenizerRecord) -> None:
    without_end, openings = 0, Counter[int]()
    for first in range(0, corpus.num_documents, _DOCUMENTS):
        bounds = corpus.boundaries(first, min(_DOCUMENTS, corpus.num_documents - first))
        full = bounds[1:] > bounds[:-1]
        without_end += int(np.count_nonzero(~full))
        without_end += int(np.count_nonzero(corpus.tokens[bounds[1:][full] - 1] != tokenizer.eod_id))
        opening, counts = np.unique(corpus.tokens[bounds[:-1][full]], return_counts=True)
        openings.update(dict(zip(opening.tolist(), counts.tolist(), strict=True)))
    if without_end:
        print(
            f"{name}: {without_end:,} of {corpus.num_documents:,} documents do not end with the end-of-document token "
            f"{tokenizer.eod_id}; where they end, windows run on without a mark",
            file=sys.stderr,
        )
    _check_openings(corpus, name, openings, tokenizer.bos_id)


def _check_openings(corpus: IndexedCorpus, name: str, openings: Counter[int], bos_id: int | None) -> None:
    """`openings`: how many documents open with each token."""
    documents = openings.total()
    without = documents - (0 if bos_id is None else openings[bos_id])
    if bos_id is None:
        if documents > 1 and len(openings) == 1:
            [token] = openings
            print(
                f"{name}: each of its {documents:,} documents opens with token {token}; if that is the BOS token, set "
                "preprocess.bos: true for all corpora of the manifest",
                file=sys.stderr,
            )
    elif documents and without == documents:
        raise UserError(
            f"no document in {corpus.prefix}.bin opens with the BOS token {bos_id}, as all of the manifest do; make "
            "the corpus again from its text, or make all of them with preprocess.bos: false"
        )
    elif without:
        print(
            f"{name}: {without:,} of {documents:,} documents do not open with the BOS token {bos_id}, as all others do",
            file=sys.stderr,
        )
