"""The part of each corpus that a run reads: a number of documents, or a share of the tokens, per language."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lpr.data.corpus.manifest import ROLES, Corpus, Manifest
from megatron_lpr.errors import UserError, nearest
from megatron_lpr.recipe.settings import ReplayConfig


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Documents or tokens of a corpus that are read; 0: no limit."""

    documents: int = 0
    tokens: int = 0


def subsets(manifest: Manifest, replay: ReplayConfig) -> tuple[Subset, ...]:
    """The subset of every corpus. Documents of a language are shared out over its corpora by their numbers.

    Raises:
        UserError: an unknown language, or both for one language.
    """
    languages = {corpus.language: corpus.role for corpus in manifest.corpora}
    for field, limits in (("documents", replay.documents), ("tokens", replay.tokens)):
        for key in limits:
            known = (*ROLES, *languages)
            if key not in known:
                raise UserError(f"data.replay.{field}: no role or language '{key}'{nearest(key, known)}")
    parts: dict[str, Subset] = {}
    for language, role in languages.items():
        corpora = [corpus for corpus in manifest.corpora if corpus.language == language]
        documents = replay.documents.get(language, replay.documents.get(role))
        share = replay.tokens.get(language, replay.tokens.get(role))
        if documents is not None and share is not None:
            raise UserError(f"data.replay: documents and tokens are both limited for {language}; keep one of the two")
        if documents is not None:
            parts |= zip((c.name for c in corpora), _documents(corpora, documents), strict=True)
        if share is not None:
            parts |= {c.name: Subset(tokens=max(2, round(c.tokens * share))) for c in corpora}
    return tuple(parts.get(corpus.name, Subset()) for corpus in manifest.corpora)


def _documents(corpora: Sequence[Corpus], wanted: int) -> list[Subset]:
    """`wanted` documents in proportion to the corpora's, by largest remainder, at least one each."""
    total = sum(corpus.documents for corpus in corpora)
    if wanted >= total:
        return [Subset()] * len(corpora)
    counts = [corpus.documents * wanted // total for corpus in corpora]
    by_remainder = sorted(range(len(corpora)), key=lambda i: -(corpora[i].documents * wanted % total))
    for i in by_remainder[: wanted - sum(counts)]:
        counts[i] += 1
    return [Subset(documents=max(1, count)) for count in counts]
