"""The replay sampler: which tokens sample k of a run holds, as a pure function of k.

    k --mixture--> corpus, its n-th sample --> epoch = n // windows, window = permutation[epoch](n % windows)

Nothing is built, cached on disk or communicated: any rank can ask for any sample at any time. The arithmetic lives in
csrc/ (mixture.h, permutation.h, corpus.h); this is its face.

Shape legend: B samples, S positions of a sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_lpr._replay_sampler import CorpusSpec, MixtureSpec, Prefetcher, Sampler, SamplerSettings
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.data_state import DataState
from megatron_lpr.data.sampler.mixture import Subset, mixtures, subsets
from megatron_lpr.recipe.sections import check_section, check_setting
from megatron_lpr.recipe.settings import DataConfig, ReplayConfig, ScheduleEntry, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Where a sample comes from: index into `manifest.corpora`, window of that corpus, pass over it."""

    corpus: int
    window: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples as NumPy arrays [B, S]: tokens, labels and language tags int64, loss mask float32.

    The tag of a position is that of the token it holds (whose routing it describes): the corpus' language, or that of
    the sidecar's run that the token lies in, so an end-of-document token has the tag of the run it stands in. Positions
    without a label (behind a short window's end) hold eod_id, loss mask 0, tag 0 and document -1.

    `documents_BS`, int32, numbers the documents of each sample from 0 on; None unless the sampler was asked for them.
    """

    tokens_BS: np.ndarray
    labels_BS: np.ndarray
    loss_mask_BS: np.ndarray
    tags_BS: np.ndarray
    documents_BS: np.ndarray | None = None

    @staticmethod
    def empty(count: int, seq_length: int, *, document_ids: bool = False) -> "Batch":
        """Uninitialised buffers for `count` samples."""
        shape = (count, seq_length)
        return Batch(
            tokens_BS=np.empty(shape, np.int64),
            labels_BS=np.empty(shape, np.int64),
            loss_mask_BS=np.empty(shape, np.float32),
            tags_BS=np.empty(shape, np.int64),
            documents_BS=np.empty(shape, np.int32) if document_ids else None,
        )


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Valid positions (those with a label): all, of original languages, and per language of the manifest."""

    tokens: int
    original_tokens: int
    tokens_per_language: dict[str, int]


class ReplaySampler:
    """Samples of a run over the corpora of a manifest.

    For every prefix of a mixture of the schedule and every corpus, the number of samples it gave differs from its share
    by less than one; for a role by at most a half. Where the mixture changes every corpus goes on with its next window.
    The order of a corpus' windows depends on nothing but the seed, its digest and the epoch.

    Attributes:
        mixtures: the schedule, resolved to exact fractions.
        shares: each corpus' share of the samples in the first mixture, in the manifest's order.
        windows: how corpora are cut.

    Args:
        manifest: corpora, languages, roles and weights.
        seq_length: positions of a sample.
        seed: of the window order, 0 <= seed < 2^63.
        mixture: share of the samples per role, as {"expanded": 0.5, "original": 0.5}; normalised to sum 1.
        schedule: mixtures that take over later.
        windows: "packed" (every epoch cuts the corpus elsewhere), "fixed" (always alike; both in corpus.h), or
            "document" (one document per sample, cut or padded).
        replay: subset of the documents that are read. It is a run of consecutive documents at a place that the seed
            chooses: a random subset of a corpus that was shuffled, as preprocessing does.
        document_ids: whether batches number their documents.

    Raises:
        UserError: a setting outside its range, an unknown corpus or language, a share or weight that is too small, a
            role without corpora, or a corpus of fewer than two tokens. Files are opened when the first sample of a
            corpus is read; what is wrong with them is raised there.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seq_length: int,
        seed: int,
        mixture: Mapping[str, float],
        schedule: Sequence[ScheduleEntry] = (),
        windows: str = "packed",
        replay: ReplayConfig | None = None,
        document_ids: bool = False,
    ):
        data = DataConfig(
            manifest=manifest.path,
            seq_length=seq_length,
            mixture=dict(mixture),
            schedule=tuple(schedule),
            replay=replay or ReplayConfig(),
        )
        check_section(data, "data")
        check_setting(TrainConfig, "seed", seed, "train.seed")
        self.manifest = manifest
        self.seq_length = seq_length
        self.seed = seed
        self.document_ids = document_ids
        self.mixtures = mixtures(manifest, data.mixture, data.schedule)
        self.windows = windows
        self._subset = subsets(manifest, data.replay)
        self._sampler = Sampler(
            _corpus_specs(manifest, self._subset),
            [
                MixtureSpec(
                    first_sample=mixture.first_sample,
                    expanded_numerator=mixture.expanded.numerator,
                    expanded_denominator=mixture.expanded.denominator,
                    weights=mixture.weights,
                )
                for mixture in self.mixtures
            ],
            SamplerSettings(
                seq_length=seq_length,
                one_document=windows == "document",
                shift_windows=windows == "packed",
                seed=seed,
                eod_id=manifest.tokenizer.eod_id,
                vocab_size=manifest.tokenizer.vocab_size,
                num_languages=len(manifest.languages),
                document_ids=document_ids,
            ),
        )

    @staticmethod
    def of(manifest: Manifest, data: DataConfig, seed: int, *, document_ids: bool = False) -> "ReplaySampler":
        """The sampler of a recipe's data section; `document_ids` numbers documents even where no attention needs it."""
        return ReplaySampler(
            manifest,
            seq_length=data.seq_length,
            seed=seed,
            mixture=data.mixture,
            schedule=data.schedule,
            windows=data.windows,
            replay=data.replay,
            document_ids=document_ids or data.reset_attention,
        )

    @property
    def shares(self) -> tuple[Fraction, ...]:
        return self.mixtures[0].shares

    def num_windows(self, corpus: int) -> int:
        """Samples in one epoch of a corpus: ceil((tokens - 1) / seq_length), or its documents."""
        return self._sampler.num_windows(corpus)

    def num_tokens(self, corpus: int) -> int:
        """Tokens of a corpus that are read: all, or those of its subset."""
        return self._sampler.num_tokens(corpus)

    def samples_before(self, k: int) -> list[int]:
        """Samples of each corpus among the run's first k."""
        return self._sampler.samples_before(k)

    def epochs_before(self, k: int) -> list[float]:
        """How often the run's first k samples pass over each corpus, or over what is read of it."""
        return [samples / self.num_windows(corpus) for corpus, samples in enumerate(self.samples_before(k))]

    def picks(self, first: int, count: int) -> np.ndarray:
        """Corpus, window and epoch of samples first, ..., first + count - 1: uint64 [count, 3]."""
        return self._sampler.picks(first, count)

    def pick(self, k: int) -> Pick:
        """Where sample k >= 0 of the run comes from."""
        corpus, window, epoch = self._sampler.picks(k, 1)[0].tolist()
        return Pick(corpus=corpus, window=window, epoch=epoch)

    def spans(self, pick: Pick) -> list[tuple[int, int]]:
        """(first token, positions) of the one or two pieces of the corpus that a sample holds."""
        return self._sampler.spans(pick.corpus, pick.window, pick.epoch)

    def documents(self, pick: Pick) -> list[tuple[int, int, int]]:
        """(document, first token, positions) of the documents that a sample holds; needs `document_ids`."""
        return self._sampler.documents(pick.corpus, pick.window, pick.epoch)

    def fill(self, first: int, count: int, out: Batch | None = None) -> Batch:
        """Samples first, ..., first + count - 1, written into `out` where given; releases the GIL."""
        out = Batch.empty(count, self.seq_length, document_ids=self.document_ids) if out is None else out
        buffers = (out.tokens_BS, out.labels_BS, out.loss_mask_BS, out.tags_BS, out.documents_BS)
        self._sampler.fill(first, count, *buffers)
        return out

    def batches(self, first: int, count: int, stride: int, *, read_ahead: int = 0) -> Iterator[Batch]:
        """fill(first + i * stride, count) for i = 0, 1, ..., without end.

        With `read_ahead` a thread keeps so many batches ready; they are the same, and what goes wrong while one is read
        is raised where that batch is asked for. Their memory is used again once no array of a batch is referred to.
        """
        if not read_ahead:
            while True:
                yield self.fill(first, count)
                first += stride
        prefetcher = Prefetcher(self._sampler, first, count, stride, read_ahead, 1)
        while True:
            tokens, labels, loss_mask, tags, documents = prefetcher.next()
            yield Batch(
                tokens_BS=tokens, labels_BS=labels, loss_mask_BS=loss_mask, tags_BS=tags, documents_BS=documents
            )

    def count(self, first: int, count: int) -> BatchCounts:
        """Valid positions of samples first, ..., first + count - 1, without reading a token.

        In closed form for packed windows of one language; documents and mixed languages are looked up sample by sample,
        except in whole epochs.
        """
        roles = self.manifest.language_roles
        per_language = dict(zip(roles, self._sampler.count(first, count), strict=True))
        return BatchCounts(
            tokens=sum(per_language.values()),
            original_tokens=sum(n for language, n in per_language.items() if roles[language] == "original"),
            tokens_per_language=per_language,
        )

    def state(self, consumed_samples: int) -> dict:
        """What a checkpoint keeps of the data: integers and digests, plain types only."""
        return self._state().to_tree(consumed_samples)

    def check_state(self, state: Mapping) -> None:
        """Checks that a run can go on with this sampler where the one of `state` stopped.

        Whatever has not been read yet may change: mixtures that take over later, and corpora that only those use.

        Raises:
            UserError: naming everything that changed.
        """
        self._state().check(state, self.manifest.path)

    def _state(self) -> DataState:
        return DataState(
            manifest=self.manifest,
            mixtures=self.mixtures,
            subset=self._subset,
            settings={"seed": self.seed, "seq_length": self.seq_length, "windows": self.windows},
        )


def _corpus_specs(manifest: Manifest, subset: Sequence[Subset]) -> list[CorpusSpec]:
    roles = manifest.language_roles
    tags = {
        language: index * (-1 if roles[language] == "expanded" else 1) for index, language in enumerate(roles, start=1)
    }
    return [
        CorpusSpec(
            prefix=corpus.prefix,
            stream=int(corpus.digest[:16], 16),
            expanded=corpus.role == "expanded",
            tags=[tags[language] for language in corpus.languages or (corpus.language,)],
            sidecar=corpus.languages is not None,
            documents=corpus.documents,
            tokens=corpus.tokens,
            document_limit=part.documents,
            token_limit=part.tokens,
        )
        for corpus, part in zip(manifest.corpora, subset, strict=True)
    ]
