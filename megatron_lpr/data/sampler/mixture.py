"""What of each corpus a run reads, and in which mixtures: a recipe's decimals as the exact numbers of csrc/.

Decimals become shares of the roles and integer weights of the corpora, and documents or tokens of each corpus.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

from megatron_lpr.data.corpus.manifest import ROLES, Corpus, Manifest
from megatron_lpr.errors import UserError, nearest
from megatron_lpr.recipe.settings import ReplayConfig, ScheduleEntry

# Limits of csrc/mixture.h and csrc/split.h: the sum of the weights in a role, and the denominator of a role's share.
_MAX_TOTAL = 1 << 60
_MAX_DENOMINATOR = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What the samples of a run are made of from sample `first_sample` on, until the next mixture.

    Attributes:
        expanded: share of the samples that are of expanded corpora; the rest is original.
        weights: per corpus, in the manifest's order; integers, coprime within each role, 0 where it is left out.
        shares: each corpus' share of the samples.
    """

    first_sample: int
    expanded: Fraction
    weights: tuple[int, ...]
    shares: tuple[Fraction, ...]


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Documents or tokens of a corpus that are read; 0: no limit."""

    documents: int = 0
    tokens: int = 0


def mixtures(
    manifest: Manifest, mixture: Mapping[str, float], schedule: Sequence[ScheduleEntry] = ()
) -> tuple[Mixture, ...]:
    """`mixture` from sample 0 on, and those of `schedule` from theirs; both as `check_section` lets them pass.

    Raises:
        UserError: an unknown corpus, a share or weight that is too small, or a role with a share and no corpora.
    """
    first = ScheduleEntry(from_sample=0)
    if schedule and schedule[0].from_sample == 0:
        first, *schedule = schedule
    return tuple(
        _mixture(manifest, mixture if entry.mixture is None else entry.mixture, entry) for entry in (first, *schedule)
    )


def _mixture(manifest: Manifest, mixture: Mapping[str, float], entry: ScheduleEntry) -> Mixture:
    weights = corpus_weights(manifest, entry.weights)
    used = {corpus.role for corpus, weight in zip(manifest.corpora, weights, strict=True) if weight}
    share = role_shares(manifest, mixture, used)
    total = dict.fromkeys(ROLES, 0)
    for corpus, weight in zip(manifest.corpora, weights, strict=True):
        total[corpus.role] += weight
    return Mixture(
        first_sample=entry.from_sample,
        expanded=share["expanded"],
        weights=tuple(weights),
        shares=tuple(
            share[corpus.role] * Fraction(weight, total[corpus.role] or 1)
            for corpus, weight in zip(manifest.corpora, weights, strict=True)
        ),
    )


def role_shares(manifest: Manifest, mixture: Mapping[str, float], used: set[str]) -> dict[str, Fraction]:
    """Share of the samples per role, both roles, sum one; `mixture` is described in ReplaySampler.

    Args:
        used: roles that have a corpus with a weight.

    Raises:
        UserError: a share that is too small, or a role without corpora.
    """
    asked = dict.fromkeys(ROLES, Fraction(0)) | {role: _exact(share) for role, share in mixture.items()}
    total = sum(asked.values())
    for role in ROLES:
        if asked[role] > 0 and role not in used:
            review = "review without original-language data: " if role == "original" else ""
            raise UserError(
                f"{review}the mixture asks for {role} data, but no corpus of {manifest.path} has that role (and a "
                f"weight); add a corpus with role: {role}, or set its share to 0"
            )
    expanded = (asked["expanded"] / total).limit_denominator(_MAX_DENOMINATOR)
    for role, exact in (("expanded", expanded), ("original", 1 - expanded)):
        if exact == 0 and asked[role] > 0:
            raise UserError(f"the mixture's share of {role} data is too small: {mixture[role]}")
    return {"expanded": expanded, "original": 1 - expanded}


def corpus_weights(manifest: Manifest, overrides: Mapping[str, float]) -> list[int]:
    """Integer weights in the manifest's order, coprime within each role and of a sum of at most 2^60.

    Args:
        overrides: weights of corpora by name, instead of the manifest's; 0 leaves a corpus out.

    Raises:
        UserError: an unknown corpus, or a weight below 2^-60 of its role.
    """
    names = [corpus.name for corpus in manifest.corpora]
    known = set(names)
    for name in overrides:
        if name not in known:
            raise UserError(f"data.schedule: no corpus '{name}' in {manifest.path}{nearest(name, names)}")
    weights = [0] * len(names)
    for role in ROLES:
        members = [index for index, corpus in enumerate(manifest.corpora) if corpus.role == role]
        exact = [_exact(overrides.get(names[index], manifest.corpora[index].weight)) for index in members]
        for index, asked, integer in zip(members, exact, _coprime_integers(exact), strict=True):
            if asked and not integer:
                raise UserError(
                    f"{manifest.path}: the weight of corpus '{names[index]}' is below 1 in 2^60 of its role; give it "
                    "more, or take the corpus out"
                )
            weights[index] = integer
    return weights


def _coprime_integers(weights: list[Fraction]) -> list[int]:
    """Integers in the proportion of `weights`, rounded to the largest sum allowed where they exceed it."""
    scale = reduce(math.lcm, (weight.denominator for weight in weights), 1)
    integers = [int(weight * scale) for weight in weights]
    total = sum(integers)
    divisor = math.gcd(*integers)
    if total > _MAX_TOTAL * divisor:
        integers = [weight * _MAX_TOTAL // total for weight in integers]
        divisor = math.gcd(*integers)
    return [integer // divisor for integer in integers] if divisor else integers


def _exact(number: float) -> Fraction:
    """The decimal that the user wrote: 0.1 is 1/10, not the nearest binary fraction."""
    return Fraction(str(number))


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
    of_language: dict[str, list[Corpus]] = {}
    for corpus in manifest.corpora:
        of_language.setdefault(corpus.language, []).append(corpus)
    for language, corpora in of_language.items():
        role = languages[language]
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
