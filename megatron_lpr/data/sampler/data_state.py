"""What a checkpoint keeps of a run's data, and whether a resumed run reads on as if it had never stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lpr.data.corpus.manifest import Corpus, Manifest
from megatron_lpr.data.sampler.mixture import Mixture, Subset
from megatron_lpr.errors import UserError

_VERSION = 3  # of the order of samples


@dataclass(frozen=True, kw_only=True)
class DataState:
    """Everything that decides which tokens a sample holds; `settings` are the sampler's numbers and words."""

    manifest: Manifest
    mixtures: Sequence[Mixture]
    subset: Sequence[Subset]
    settings: Mapping[str, Any]

    def to_tree(self, consumed_samples: int) -> dict[str, Any]:
        """Plain types: integers, digests and exact fractions."""
        names = [corpus.name for corpus in self.manifest.corpora]
        return {
            "version": _VERSION,
            "consumed_samples": consumed_samples,
            **self.settings,
            "tokenizer": self.manifest.tokenizer.sha256,
            "eod_id": self.manifest.tokenizer.eod_id,
            "schedule": [
                {
                    "from_sample": mixture.first_sample,
                    "shares": {name: str(share) for name, share in zip(names, mixture.shares, strict=True) if share},
                }
                for mixture in self.mixtures
            ],
            "corpora": {
                corpus.name: _identity(corpus, part)
                for corpus, part in zip(self.manifest.corpora, self.subset, strict=True)
            },
        }

    def check(self, saved: Mapping[str, Any], manifest_path: str) -> None:
        """Compares with what the run of `saved` has read so far.

        Raises:
            UserError: naming everything that changed; or the samples come in another order by now.
        """
        if saved.get("version") != _VERSION:
            raise UserError(
                f"the run began with another version of megatron_lpr, which reads samples in another order (version "
                f"{saved.get('version')} of the data's state, here it is {_VERSION}): let that version finish the run, "
                "or start a new run with its weights as model.load"
            )
        own = self.to_tree(0)
        changes = [
            f"{key} was {saved.get(key)}, is {own[key]}"
            for key in (*self.settings, "tokenizer", "eod_id")
            if saved.get(key) != own[key]
        ]
        consumed = saved["consumed_samples"]
        before, now = (_used(tree["schedule"], consumed) for tree in (saved, own))
        changes += _schedule_changes(before, now)
        for name in dict.fromkeys(name for mixture in before for name in mixture["shares"]):
            if name in own["corpora"]:
                changes += _corpus_changes(name, saved["corpora"].get(name, {}), own["corpora"][name])
        if changes:
            raise UserError(
                f"the run cannot go on with other data than it started with: {'; '.join(changes)}; restore "
                f"{manifest_path} and the recipe's data settings, or start a new run"
            )


def _identity(corpus: Corpus, part: Subset) -> dict[str, Any]:
    fields = ("digest", "index_digest", "language", "role", "tokens")
    identity: dict[str, Any] = {field: getattr(corpus, field) for field in fields}
    if corpus.languages:
        identity |= {"languages": dict(corpus.languages), "language_digest": corpus.language_digest}
    limits = {"documents_read": part.documents, "tokens_read": part.tokens}
    return identity | {field: limit for field, limit in limits.items() if limit}


def _used(schedule: Sequence[Mapping[str, Any]], consumed: int) -> list[Mapping[str, Any]]:
    return [mixture for mixture in schedule if mixture["from_sample"] < consumed]


def _schedule_changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    starts, own_starts = ([mixture["from_sample"] for mixture in mixtures] for mixtures in (before, now))
    if starts != own_starts:
        return [f"the mixtures up to here took over at samples {starts}, now at {own_starts}"]
    changes = []
    for old, new in zip(before, now, strict=True):
        where = f"from sample {old['from_sample']} on"
        names = dict.fromkeys([*old["shares"], *new["shares"]])
        for name in names:
            was, is_now = old["shares"].get(name, "0"), new["shares"].get(name, "0")
            if was != is_now:
                changes.append(f"the share of corpus '{name}' {where} was {was}, is {is_now}")
        if not changes and list(old["shares"]) != list(new["shares"]):
            changes.append(f"the order of the corpora {where}")
    return changes


def _corpus_changes(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{field} of corpus '{name}' was {before.get(field)}, is {now.get(field)}"
        for field in dict.fromkeys([*before, *now])
        if before.get(field) != now.get(field)
    ]
