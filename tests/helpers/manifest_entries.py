"""Entries of manifests for tests that compare no file with its digest."""

from typing import Any

from megatron_lpr.data.corpus.manifest import Corpus, TokenizerRecord


def entry(name: str, role: str = "expanded", **fields: Any) -> Corpus:
    """A corpus of one document, with zeros for digests, named as its language and its files are."""
    zeros = {"digest": "0" * 64, "index_digest": "0" * 64, "spot_digests": {"bin": "0" * 64, "idx": "0" * 64}}
    return Corpus(**zeros | {"name": name, "prefix": name, "language": name, "role": role, "documents": 1} | fields)


def tokenizer_record(vocab_size: int, eod_id: int = 0) -> TokenizerRecord:
    """Of no file."""
    return TokenizerRecord(name="toy", vocab_size=vocab_size, sha256="0" * 64, eod_id=eod_id, parse_special_tokens=True)
