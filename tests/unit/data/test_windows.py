"""What samples hold beyond packed windows of whole corpora: one document each, document numbers, subsets."""

import dataclasses

import numpy as np
import pytest
from manifest_entries import entry, tokenizer_record
from sampler_oracle import place_of_subset

from megatron_lpr.data.corpus.indexed import IndexedCorpus, IndexedWriter
from megatron_lpr.data.corpus.manifest import Manifest, TextSource
from megatron_lpr.data.sampler.inspect_data import repeated, short_windows, unshuffled
from megatron_lpr.data.sampler.replay_sampler import Pick, ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import ReplayConfig, ScheduleEntry, TrainConfig

S = 12
EOD = 2
# among them a document of one token, one that fills a sample exactly, and one that is a token too long
LENGTHS = [5, 1, 13, 14, 2, 30, 12, 3, 40, 7]


@pytest.fixture
def manifest(write_corpus) -> Manifest:
    """Documents of distinct tokens: 1000 * number + place."""
    corpora = []
    for number, (language, role) in enumerate([("hu", "expanded"), ("en", "original"), ("en", "original")]):
        documents = [
            [1000 * i + place + 10 for place in range(length)] for i, length in enumerate(LENGTHS[: 10 - number])
        ]
        prefix = write_corpus(f"{language}{number}", documents, vocab_size=60_000)
        name, digest = f"{language}{number}", f"{number + 1}" * 64
        sizes = {"documents": len(documents), "tokens": sum(map(len, documents))}
        corpora.append(entry(name, role, prefix=prefix, language=language, digest=digest, **sizes))
    return Manifest(path="manifest.yaml", tokenizer=tokenizer_record(60_000, EOD), corpora=tuple(corpora))


def make(manifest: Manifest, **settings) -> ReplaySampler:
    return ReplaySampler(
        manifest, **({"seq_length": S, "seed": 3, "mixture": {"expanded": 1, "original": 1}} | settings)
    )


def test_one_document_per_sample(manifest):
    sampler = make(manifest, windows="document", document_ids=True)
    assert [sampler.num_windows(corpus) for corpus in range(3)] == [10, 9, 8]
    corpora = [IndexedCorpus(corpus.prefix) for corpus in manifest.corpora]
    batch = sampler.fill(0, 80)
    for row in range(80):
        pick = sampler.pick(row)
        document = corpora[pick.corpus].document(pick.window).astype(np.int64)
        valid = min(S, len(document) - 1)
        np.testing.assert_array_equal(batch.tokens_BS[row], [*document[:valid], *[EOD] * (S - valid)])
        np.testing.assert_array_equal(batch.labels_BS[row], [*document[1 : valid + 1], *[EOD] * (S - valid)])
        np.testing.assert_array_equal(batch.loss_mask_BS[row], np.arange(S) < valid)
        np.testing.assert_array_equal(batch.tags_BS[row] != 0, np.arange(S) < valid)
        np.testing.assert_array_equal(batch.documents_BS[row], np.where(np.arange(S) < valid, 0, -1))


def test_documents_of_an_index_of_many_blocks(tmp_path):
    """More blocks than are kept in memory (csrc/load.h): one takes another's place."""
    lengths = np.tile(np.array([2, 3, 4], np.int32), 100_000)
    with IndexedWriter(str(tmp_path / "large"), 1000) as writer:
        writer.add_documents(np.zeros(lengths.sum(), writer.dtype), lengths)
    sizes = {"documents": len(lengths), "tokens": int(lengths.sum())}
    large = entry("large", prefix=str(tmp_path / "large"), digest="1" * 64, **sizes)
    manifest = Manifest(path="manifest.yaml", tokenizer=tokenizer_record(1000, EOD), corpora=(large,))
    sampler = make(manifest, windows="document", mixture={"expanded": 1})
    starts = np.cumsum(lengths) - lengths
    for pick in map(sampler.pick, range(2000)):
        assert sampler.spans(pick) == [(starts[pick.window], lengths[pick.window] - 1)]


def test_documents_are_numbered_within_each_sample(manifest):
    """A new number begins exactly where a document does: with a token that ends in 10, or at the corpus' seam."""
    sampler = make(manifest, document_ids=True)
    batch = sampler.fill(0, 120)
    wrapped = 0
    for row in range(120):
        valid = int(batch.loss_mask_BS[row].sum())
        tokens, numbers = batch.tokens_BS[row, :valid], batch.documents_BS[row, :valid]
        starts = (tokens % 1000 == 10)[1:]
        np.testing.assert_array_equal(np.diff(numbers), starts)
        assert numbers[0] == 0 and (batch.documents_BS[row, valid:] == -1).all()
        wrapped += len(sampler.spans(sampler.pick(row))) == 2
    assert wrapped > 0


@pytest.mark.parametrize("windows", ["packed", "fixed", "document"])
@pytest.mark.parametrize("replay", [{}, {"documents": {"original": 5, "hu": 3}}, {"tokens": {"original": 0.4}}])
@pytest.mark.parametrize("first, count", [(0, 1), (0, 50), (37, 400), (10**12, 60)])
def test_counts_equal_the_filled_masks(manifest, windows, replay, first, count):
    sampler = make(manifest, windows=windows, replay=ReplayConfig(**replay))
    batch, counts = sampler.fill(first, count), sampler.count(first, count)
    assert counts.tokens == batch.loss_mask_BS.sum()
    assert counts.tokens_per_language == {"hu": (batch.tags_BS == -1).sum(), "en": (batch.tags_BS == 2).sum()}
    assert counts.original_tokens == counts.tokens_per_language["en"]


def documents_read(sampler: ReplaySampler, samples: int = 300) -> list[set[int]]:
    """Documents of each corpus whose tokens the first samples hold."""
    read = [set(), set(), set()]
    batch = sampler.fill(0, samples)
    for row, (corpus, _, _) in enumerate(sampler.picks(0, samples).tolist()):
        held = batch.tokens_BS[row, batch.loss_mask_BS[row] == 1]
        read[corpus] |= set((held // 1000).tolist())
    return read


@pytest.mark.parametrize("windows", ["packed", "document"])
def test_a_number_of_documents_per_language(manifest, windows):
    """4 of 17 English documents: 2 of 9 and 2 of 8; consecutive, always the same, elsewhere with another seed."""
    chosen = set()
    for seed in range(40):
        sampler = make(manifest, windows=windows, seed=seed, replay=ReplayConfig(documents={"original": 4}))
        hu, *en = documents_read(sampler)
        # of a document of one token behind the run's first, nothing is read: it has no label
        assert hu >= set(range(10)) - {1}
        for documents in en:
            assert len(documents) <= 2 and max(documents) - min(documents) <= 1
        chosen.add(tuple(map(min, en)))
    assert len(chosen) > 10


def test_the_least_that_is_read_of_a_corpus(manifest):
    """A document, or two tokens: none would mean all."""
    replay = ReplayConfig(documents={"original": 1}, tokens={"hu": 1e-6})
    sampler = make(manifest, windows="document", replay=replay)
    assert sampler.num_tokens(0) == 2
    assert [sampler.num_windows(corpus) for corpus in (1, 2)] == [1, 1]


def test_a_limit_of_a_language_goes_before_that_of_its_role(manifest):
    documents = make(manifest, windows="document", replay=ReplayConfig(documents={"original": 17, "en": 2}))
    assert [documents.num_windows(corpus) for corpus in (1, 2)] == [1, 1]
    tokens = make(manifest, replay=ReplayConfig(tokens={"expanded": 0.1, "hu": 0.5}))
    assert tokens.num_tokens(0) == round(manifest.corpora[0].tokens * 0.5)


def test_a_share_of_the_tokens(manifest):
    sampler = make(manifest, replay=ReplayConfig(tokens={"original": 0.25, "hu": 0.5}))
    for corpus, share in ((0, 0.5), (1, 0.25), (2, 0.25)):
        assert sampler.num_tokens(corpus) == round(manifest.corpora[corpus].tokens * share)
    first = min(first for first, _ in sampler.spans(sampler.pick(0)))
    offsets = np.cumsum([0, *LENGTHS])
    assert first in offsets or sampler.pick(0).window > 0


@pytest.mark.parametrize("seed", range(8))
def test_a_subset_lies_where_it_always_has(manifest, seed):
    """A run that goes on after an update reads the documents that it has begun with."""
    documents = make(manifest, seed=seed, replay=ReplayConfig(documents={"original": 4}))
    tokens = make(manifest, seed=seed, replay=ReplayConfig(tokens={"original": 0.25}))
    offsets = np.cumsum([0, *LENGTHS])
    for number, corpus in enumerate(manifest.corpora[1:], start=1):
        stream, first = int(corpus.digest[:16], 16), Pick(corpus=number, window=0, epoch=0)
        assert documents.spans(first)[0][0] == offsets[place_of_subset(seed, stream, corpus.documents - 2 + 1)]
        token = place_of_subset(seed, stream, corpus.tokens - tokens.num_tokens(number) + 1)
        assert tokens.spans(first)[0][0] == max(offset for offset in offsets if offset <= token)


def test_tokens_that_end_with_a_document_read_none_of_the_next(write_corpus):
    prefix = write_corpus("even", [[number] * 10 for number in range(10)], vocab_size=60_000)
    even = entry("even", prefix=prefix, language="hu", digest="1" * 64, documents=10, tokens=100)
    manifest = Manifest(path="manifest.yaml", tokenizer=tokenizer_record(60_000, EOD), corpora=(even,))
    replay = ReplayConfig(tokens={"hu": 0.3})
    assert make(manifest, windows="document", mixture={"expanded": 1}, replay=replay).num_windows(0) == 3


def test_whole_epochs_are_counted_at_once(manifest):
    """Visited one by one, so many samples would take years."""
    sampler = make(manifest, windows="document", mixture={"expanded": 1})
    per_epoch = sum(min(S, length - 1) for length in LENGTHS)
    assert sampler.count(0, 10**15 * len(LENGTHS)).tokens == 10**15 * per_epoch


@pytest.mark.parametrize(
    "replay, message",
    [
        ({"documents": {"enn": 5}}, "data.replay.documents: no role or language 'enn'; did you mean 'en'"),
        ({"documents": {"en": 0}}, "data.replay.documents.en: 0; at least 1"),
        ({"tokens": {"original": 1.5}}, "data.replay.tokens.original: 1.5; above 0, at most 1"),
        ({"tokens": {"original": 0.5}, "documents": {"en": 3}}, "both limited for en"),
    ],
)
def test_bad_subsets(manifest, replay, message):
    with pytest.raises(UserError, match=message):
        make(manifest, replay=ReplayConfig(**replay))


def test_warns_of_a_subset_of_a_corpus_that_nobody_shuffled(manifest):
    source = TextSource(sha256="ab", seed=0, skipped_lines=0)
    manifest = manifest.with_corpora([dataclasses.replace(manifest.corpora[1], source=source)])
    (warning,) = unshuffled(manifest, ReplayConfig(documents={"original": 3}))
    assert "corpus 'en2' was not written by megatron-lpr preprocess" in warning
    assert unshuffled(manifest, ReplayConfig(documents={"original": 17})) == []


def test_as_many_documents_as_there_are_is_all(manifest):
    sampler = make(manifest, replay=ReplayConfig(documents={"original": 17, "expanded": 10**9}))
    assert [sampler.num_tokens(c) for c in range(3)] == [corpus.tokens for corpus in manifest.corpora]


@pytest.mark.parametrize("windows", ["packed", "fixed", "document"])
def test_windows_with_few_labels_are_warned_of(make_manifest, windows):
    manifest = make_manifest(
        ("short", "hu", "expanded", 1.0, 6), ("long", "hu", "expanded", 1.0, 990), ("off", "hu", "expanded", 1.0, 3)
    )
    sampler = ReplaySampler(
        manifest,
        seq_length=100,
        seed=1,
        mixture={"expanded": 1},
        schedule=[ScheduleEntry(from_sample=0, weights={"off": 0})],
        windows=windows,
    )
    (warning,) = short_windows(manifest, sampler)
    share = float(warning.split("'short': ")[1].removeprefix("at most ").split("%")[0]) / 100
    mask = sampler.fill(0, 20).loss_mask_BS
    ours = [k for k in range(20) if sampler.pick(k).corpus == 0]
    assert share == 0.05 == pytest.approx(mask[ours].mean())
    assert ("choose data.windows: packed" in warning) == (windows == "document")
    assert "6 tokens in 1 " in warning and "of 100 positions" in warning


def test_text_that_is_read_again_and_again_is_warned_of(make_manifest):
    sizes = [("a", 41), ("b", 401), ("c", 91), ("d", 61), ("e", 51)]  # 4, 40, 9, 6 and 5 windows
    manifest = make_manifest(*((name, "hu", "expanded", 1.0, size) for name, size in sizes))
    sampler = ReplaySampler(manifest, seq_length=10, seed=1, mixture={"expanded": 1})

    def told(steps, trainable="new_experts_and_routers"):
        return repeated(TrainConfig(trainable=trainable, steps=steps, global_batch_size=5), sampler)

    assert not told(16)  # each corpus 16 times: "a" four times over
    assert [sentence.split(": ")[0] for sentence in told(18)] == ["the run reads 'a' 4.5 times"]
    (sentence,) = told(45)
    assert sentence.startswith("the run reads 'a' 11.2 times, 'e' 9.0 times, 'd' 7.5 times and 1 more: ")
    assert told(45, "all") == [sentence] and not told(45, "routers")
