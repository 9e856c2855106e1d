"""The replay sampler: which tokens sample k of a run holds, as a pure function of k.

    k --mixture--> corpus, its n-th sample --> epoch = n // windows, window = permutation[epoch](n % windows)

Nothing is built, cached or communicated: any rank can ask for any sample at any time. The arithmetic lives in
csrc/ (mixture.h, permutation.h); this is its face.

Shape legend: B samples, S positions of a sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_lpr._replay_sampler import Sampler
from megatron_lpr.data.manifest import ROLES, Corpus, Manifest
from megatron_lpr.data.mixture import corpus_weights, role_shares
from megatron_lpr.errors import UserError

_STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Where a sample comes from: index into `manifest.corpora`, window of that corpus, pass over it."""

    corpus: int
    window: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples as NumPy arrays [B, S]: tokens, labels and language tags int64, loss mask float32.

    Positions without a label (the end of a corpus' last window) hold eod_id, loss mask 0 and tag 0.
    """

    tokens_BS: np.ndarray
    labels_BS: np.ndarray
    loss_mask_BS: np.ndarray
    tags_BS: np.ndarray

    @staticmethod
    def empty(count: int, seq_length: int) -> "Batch":
        """Uninitialised buffers for `count` samples."""
        shape = (count, seq_length)
        return Batch(
            tokens_BS=np.empty(shape, np.int64),
            labels_BS=np.empty(shape, np.int64),
            loss_mask_BS=np.empty(shape, np.float32),
            tags_BS=np.empty(shape, np.int64),
        )


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Valid positions (those with a label): all, of original languages, and per language of the manifest."""

    tokens: int
    original_tokens: int
    tokens_per_language: dict[str, int]


class ReplaySampler:
    """Samples of a run over the corpora of a manifest.

    For every prefix of the run and every corpus, the number of samples it gave differs from its share by
    less than one; for a role by at most a half.

    Attributes:
        shares: each corpus' share of the samples, a Fraction, in the manifest's order: exactly what was asked
            for, or rounded to 2^-18 of its role where the weights need a larger common denominator.

    Args:
        manifest: corpora, languages, roles and weights.
        seq_length: positions of a sample.
        seed: of the window order, 0 <= seed < 2^63.
        mixture: share of the samples per role, as {"expanded": 0.5, "original": 0.5}; normalised to sum 1.

    Raises:
        UserError: an unknown role, a share that is no number >= 0, a role without corpora, a weight too small
            to be honoured, or a corpus that cannot be read.
    """

    def __init__(self, manifest: Manifest, *, seq_length: int, seed: int, mixture: Mapping[str, float]):
        if not 0 < seq_length <= 1 << 31:
            raise UserError(f"seq_length must be in [1, 2^31], not {seq_length}")
        if not 0 <= seed < 1 << 63:
            raise UserError(f"the data seed must be in [0, 2^63), not {seed}")
        self.manifest = manifest
        self.seq_length = seq_length
        self.seed = seed
        self._role_share = role_shares(manifest, mixture)
        weights = corpus_weights(manifest)
        period = dict.fromkeys(ROLES, 0)
        for corpus, weight in zip(manifest.corpora, weights, strict=True):
            period[corpus.role] += weight
        self.shares = tuple(
            self._role_share[corpus.role] * Fraction(weight, period[corpus.role])
            for corpus, weight in zip(manifest.corpora, weights, strict=True)
        )
        language_index = {language: index for index, language in enumerate(manifest.languages)}
        specs = []
        for corpus, weight in zip(manifest.corpora, weights, strict=True):
            expanded = corpus.role == "expanded"
            tag = (language_index[corpus.language] + 1) * (-1 if expanded else 1)
            specs.append((corpus.prefix, int(corpus.digest[:16], 16), expanded, tag, weight))
        expanded_share = self._role_share["expanded"]
        self._sampler = Sampler(
            specs,
            seq_length,
            seed,
            manifest.tokenizer.eod_id,
            expanded_share.numerator,
            expanded_share.denominator,
        )

    def num_windows(self, corpus: int) -> int:
        """Samples in one epoch of a corpus: ceil((tokens - 1) / seq_length)."""
        return self._sampler.num_windows(corpus)

    def picks(self, first: int, count: int) -> np.ndarray:
        """Corpus, window and epoch of samples first, ..., first + count - 1: uint64 [count, 3]."""
        return self._sampler.picks(first, count)

    def pick(self, k: int) -> Pick:
        """Where sample k >= 0 of the run comes from."""
        corpus, window, epoch = self._sampler.picks(k, 1)[0].tolist()
        return Pick(corpus=corpus, window=window, epoch=epoch)

    def fill(self, first: int, count: int, out: Batch | None = None) -> Batch:
        """Samples first, ..., first + count - 1, written into `out` where given; releases the GIL."""
        out = Batch.empty(count, self.seq_length) if out is None else out
        self._sampler.fill(first, count, out.tokens_BS, out.labels_BS, out.loss_mask_BS, out.tags_BS)
        return out

    def count(self, first: int, count: int) -> BatchCounts:
        """Valid positions of samples first, ..., first + count - 1, without reading a token."""
        per_language = dict.fromkeys(self.manifest.languages, 0)
        original = 0
        for corpus, positions in zip(self.manifest.corpora, self._sampler.count(first, count), strict=True):
            per_language[corpus.language] += positions
            original += positions if corpus.role == "original" else 0
        return BatchCounts(
            tokens=sum(per_language.values()), original_tokens=original, tokens_per_language=per_language
        )

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data: integers and digests, plain types only."""
        return {
            "version": _STATE_VERSION,
            "consumed_samples": consumed_samples,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "mixture": {role: str(share) for role, share in self._role_share.items()},
            "tokenizer": self.manifest.tokenizer.sha256,
            "manifest": self.manifest.digest,
            "corpora": {corpus.name: _identity(corpus) for corpus in self.manifest.corpora},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Checks that a run can go on with this sampler where the one of `state` stopped.

        Raises:
            UserError: naming everything that changed.
        """
        own = self.state(0)
        changes = []
        for key in ("version", "seed", "seq_length", "mixture", "tokenizer"):
            if state.get(key) != own[key]:
                changes.append(f"{key} was {state.get(key)}, is {own[key]}")
        saved: Mapping[str, Any] = state.get("corpora", {})
        for name in sorted(saved.keys() | own["corpora"].keys()):
            before, now = saved.get(name), own["corpora"].get(name)
            if before is None or now is None:
                changes.append(f"corpus '{name}' was {'added' if before is None else 'removed'}")
            else:
                changes += [
                    f"{field} of corpus '{name}' was {before.get(field)}, is {now[field]}"
                    for field in now
                    if before.get(field) != now[field]
                ]
        if not changes and state.get("manifest") != own["manifest"]:
            changes.append("the order of the corpora or the tokenizer's record")
        if changes:
            raise UserError(
                f"the run cannot go on with other data than it started with: {'; '.join(changes)}; restore "
                f"{self.manifest.path} and the recipe's data settings, or start a new run"
            )


def _identity(corpus: Corpus) -> dict[str, Any]:
    return {
        "digest": corpus.digest,
        "language": corpus.language,
        "role": corpus.role,
        "weight": corpus.weight,
        "tokens": corpus.tokens,
    }
