"""The mixture's exact fractions: decimals -> shares of the roles and integer weights of the corpora."""

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import reduce

from megatron_lpr.data.manifest import ROLES, Manifest
from megatron_lpr.errors import UserError, nearest

# Limits of csrc/mixture.h: the period of the corpora within a role, and the denominator of a role's share.
_MAX_PERIOD = 1 << 18
_MAX_DENOMINATOR = 1 << 62


def role_shares(manifest: Manifest, mixture: Mapping[str, float]) -> dict[str, Fraction]:
    """Share of the samples per role, both roles, sum one; `mixture` is described in ReplaySampler.

    Raises:
        UserError: an unknown role, a share that is no number >= 0 or too small, or a role without corpora.
    """
    asked = dict.fromkeys(ROLES, Fraction(0))
    for role, share in mixture.items():
        if role not in ROLES:
            raise UserError(f"the mixture has the unknown role '{role}'{nearest(role, ROLES)}")
        if not (math.isfinite(share) and share >= 0):
            raise UserError(f"the mixture's share of {role} data must be a number >= 0, not {share}")
        asked[role] = _exact(share)
    total = sum(asked.values())
    if total == 0:
        raise UserError("the mixture asks for no data: give at least one role a share above 0")
    present = {corpus.role for corpus in manifest.corpora}
    for role in ROLES:
        if asked[role] > 0 and role not in present:
            review = "review without original-language data: " if role == "original" else ""
            raise UserError(
                f"{review}the mixture asks for {role} data, but no corpus of {manifest.path} has that role; "
                f"add a corpus with role: {role}, or set its share to 0"
            )
    expanded = (asked["expanded"] / total).limit_denominator(_MAX_DENOMINATOR)
    for role, share in (("expanded", expanded), ("original", 1 - expanded)):
        if share == 0 and asked[role] > 0:
            raise UserError(f"the mixture's share of {role} data is too small: {mixture[role]}")
    return {"expanded": expanded, "original": 1 - expanded}


def corpus_weights(manifest: Manifest) -> list[int]:
    """Integer weights in the manifest's order, coprime within each role and of a sum of at most 2^18.

    Raises:
        UserError: a weight that would be rounded to nothing.
    """
    weights = [0] * len(manifest.corpora)
    for role in ROLES:
        members = [index for index, corpus in enumerate(manifest.corpora) if corpus.role == role]
        exact = [_exact(manifest.corpora[index].weight) for index in members]
        for index, weight in zip(members, _coprime_integers(exact), strict=True):
            if weight == 0:
                raise UserError(
                    f"{manifest.path}: the weight of corpus '{manifest.corpora[index].name}' is below 1 in "
                    f"{_MAX_PERIOD:,} of its role; give it more, or take the corpus out"
                )
            weights[index] = weight
    return weights


def _coprime_integers(weights: list[Fraction]) -> list[int]:
    """Integers in the proportion of `weights`, rounded to the largest sum allowed where they exceed it."""
    scale = reduce(math.lcm, (weight.denominator for weight in weights), 1)
    integers = [int(weight * scale) for weight in weights]
    total = sum(integers)
    divisor = math.gcd(*integers)
    if total > _MAX_PERIOD * divisor:
        rounded = [weight * _MAX_PERIOD // total for weight in integers]
        by_remainder = sorted(range(len(integers)), key=lambda i: -(integers[i] * _MAX_PERIOD % total))
        for index in by_remainder[: _MAX_PERIOD - sum(rounded)]:
            rounded[index] += 1
        integers, divisor = rounded, math.gcd(*rounded)
    return [integer // divisor for integer in integers] if divisor else integers


def _exact(number: float) -> Fraction:
    """The decimal that the user wrote: 0.1 is 1/10, not the nearest binary fraction."""
    return Fraction(str(number))
