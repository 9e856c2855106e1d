"""The mixtures' exact fractions: decimals -> shares of the roles and integer weights of the corpora."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

from megatron_lpr.data.corpus.manifest import ROLES, Manifest
from megatron_lpr.errors import UserError, nearest
from megatron_lpr.recipe.settings import MixturePiece

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


def mixtures(
    manifest: Manifest, mixture: Mapping[str, float], schedule: Sequence[MixturePiece] = ()
) -> tuple[Mixture, ...]:
    """`mixture` from sample 0 on, and those of `schedule` from theirs; both as `check_section` lets them pass.

    Raises:
        UserError: an unknown corpus, a share or weight that is too small, or a role with a share and no corpora.
    """
    first = MixturePiece(from_sample=0)
    if schedule and schedule[0].from_sample == 0:
        first, *schedule = schedule
    return tuple(
        _mixture(manifest, mixture if piece.mixture is None else piece.mixture, piece) for piece in (first, *schedule)
    )


def _mixture(manifest: Manifest, mixture: Mapping[str, float], piece: MixturePiece) -> Mixture:
    weights = corpus_weights(manifest, piece.weights)
    used = {corpus.role for corpus, weight in zip(manifest.corpora, weights, strict=True) if weight}
    share = role_shares(manifest, mixture, used)
    total = dict.fromkeys(ROLES, 0)
    for corpus, weight in zip(manifest.corpora, weights, strict=True):
        total[corpus.role] += weight
    return Mixture(
        first_sample=piece.from_sample,
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
    for name in overrides:
        if name not in names:
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
