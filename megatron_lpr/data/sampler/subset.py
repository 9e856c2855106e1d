"""The part of each corpus that a run reads: a number of documents, or a share of the tokens, per language."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lpr.data.corpus.manifest import ROLES, Corpus, Manifest
from megatron_lpr.errors import UserError, nearest
from megatron_lpr.recipe.settings import ReplayConfig

if TYPE_CHECKING:
    from megatron_lpr.data.sampler.replay_sampler import ReplaySampler

_FILLED = 0.8  # a larger share of labelled positions is worth no word


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


def unshuffled(manifest: Manifest, replay: ReplayConfig) -> list[str]:
    """A warning for each corpus of which a subset is read and whose documents we did not shuffle."""
    return [
        f"corpus '{corpus.name}' was not written by megatron-lpr preprocess: its subset is a run of consecutive "
        "documents, a random one only if the corpus is shuffled"
        for corpus, part in zip(manifest.corpora, subsets(manifest, replay), strict=True)
        if part != Subset() and corpus.source is None
    ]


def short_windows(manifest: Manifest, sampler: "ReplaySampler") -> list[str]:
    """A warning for each corpus that is read and fills its windows badly, because it, or its documents, are too short.

    Where a sample is one document the share is an upper bound: documents longer than the window lose their rest.
    """
    sentences = []
    for i, corpus in enumerate(manifest.corpora):
        if not any(mixture.shares[i] for mixture in sampler.mixtures):
            continue
        windows, tokens = sampler.num_windows(i), sampler.num_tokens(i)
        of_documents = sampler.windows == "document"
        share = (tokens - (windows if of_documents else 1)) / (windows * sampler.seq_length)
        if share < _FILLED:
            what = f"{windows:,} documents" if of_documents else f"{windows:,} window{'s' if windows > 1 else ''}"
            way_out = "choose data.windows: packed" if of_documents else "join it with another corpus"
            percent = f"{'at most ' if of_documents else ''}{share:.1%}"
            sentences.append(
                f"corpus '{corpus.name}': {percent} of the positions of its samples have a label ({tokens:,} tokens in "
                f"{what} of {sampler.seq_length:,} positions); {way_out}, or a smaller data.seq_length"
            )
    return sentences


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
