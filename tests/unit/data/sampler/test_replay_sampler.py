"""Batches of the replay sampler, against plain NumPy on the concatenated documents."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sampler_oracle import epoch_shift, permuted, window_positions

from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.sampler.replay_sampler import Batch, ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import ReplayConfig, ScheduleEntry

S = 16
MIXTURE = {"expanded": 0.6, "original": 0.4}


@pytest.fixture
def manifest(make_manifest) -> Manifest:
    return make_manifest(
        ("hu", "hu", "expanded", 2, 16 * 7 + 6),  # last window has 5 labels
        ("en_help", "en", "original", 1, 16 * 3 + 1),  # last window is full
        ("tr", "tr", "expanded", 1, 16 * 2 + 2),  # last window has one label
        ("en_book", "en", "original", 1, 9),  # a single short window
    )


@pytest.fixture
def sampler(manifest) -> ReplaySampler:
    return ReplaySampler(manifest, seq_length=S, seed=11, mixture=MIXTURE)


def expected_row(manifest: Manifest, corpus: int, window: int, epoch: int) -> tuple[np.ndarray, ...]:
    entry = manifest.corpora[corpus]
    stream = np.fromfile(f"{entry.prefix}.bin", dtype=np.uint16).astype(np.int64)
    shift = epoch_shift(S, 11, int(entry.digest[:16], 16), epoch)
    positions = np.array(window_positions(len(stream), S, window, shift))
    valid = len(positions)
    tokens = np.full(S, manifest.tokenizer.eod_id)
    labels = np.full(S, manifest.tokenizer.eod_id)
    tokens[:valid] = stream[positions]
    labels[:valid] = stream[positions + 1]
    tag = {"hu": -1, "en": 2, "tr": -3}[entry.language]
    return tokens, labels, (np.arange(S) < valid).astype(np.float32), np.where(np.arange(S) < valid, tag, 0)


def test_many_corpora_keep_their_orders_apart(manifest):
    """80 corpora of different sizes and keys, in turns: epoch and window of each one's samples, by bookkeeping."""
    digests = [f"{number + 1:016x}" + "0" * 48 for number in range(80)]
    corpora = tuple(
        dataclasses.replace(manifest.corpora[i % 3], name=f"c{i}", weight=1 + i % 5, digest=digest)
        for i, digest in enumerate(digests)
    )
    manifest = dataclasses.replace(manifest, corpora=corpora)
    sampler = ReplaySampler(manifest, seq_length=S, seed=11, mixture=MIXTURE)
    picks = sampler.picks(0, 3000).tolist()
    counts = [0] * 80
    for corpus, window, epoch in picks:
        windows = sampler.num_windows(corpus)
        assert epoch == counts[corpus] // windows
        assert window == permuted(windows, 11, corpus + 1, epoch, counts[corpus] % windows)
        counts[corpus] += 1
    assert min(counts) > 8
    assert sampler.picks(1700, 500).tolist() == picks[1700:2200]


def test_number_of_windows(sampler):
    assert [sampler.num_windows(corpus) for corpus in range(4)] == [8, 3, 3, 1]


def test_fill_equals_numpy(manifest, sampler):
    batch = sampler.fill(5, 100)
    seen = set()
    for row in range(100):
        pick = sampler.pick(5 + row)
        seen.add((pick.corpus, pick.window))
        actual = (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.tags_BS)
        for got, expected in zip(actual, expected_row(manifest, pick.corpus, pick.window, pick.epoch), strict=True):
            np.testing.assert_array_equal(got[row], expected)
    assert len(seen) == 8 + 3 + 3 + 1
    assert [array.dtype for array in actual] == [np.int64, np.int64, np.float32, np.int64]


def test_every_epoch_sees_every_position_once(sampler):
    """In windows that are cut elsewhere than in the epoch before."""
    seen, cuts = {}, {}
    for pick in map(sampler.pick, range(400)):
        for first, count in sampler.spans(pick):
            seen.setdefault((pick.corpus, pick.epoch), []).extend(range(first, first + count))
        if pick.corpus == 0 and pick.window == 0:
            cuts[pick.epoch] = sampler.spans(pick)[0][0]
    whole = [seen[0, epoch] for epoch in range(10)]
    assert all(sorted(positions) == list(range(16 * 7 + 5)) for positions in whole)
    assert cuts[0] == 0 and len(set(cuts.values())) > 5 and max(cuts.values()) < S


def test_fixed_windows_are_cut_alike_in_every_epoch(manifest):
    sampler = ReplaySampler(manifest, seq_length=S, seed=11, mixture=MIXTURE, windows="fixed")
    for pick in map(sampler.pick, range(200)):
        assert sampler.spans(pick)[0][0] == pick.window * S and len(sampler.spans(pick)) == 1


def test_every_epoch_visits_every_window_once_in_another_order(sampler):
    orders = {}
    for corpus, window, epoch in sampler.picks(0, 200).tolist():
        orders.setdefault((corpus, epoch), []).append(window)
    hu = [orders[0, epoch] for epoch in range(5)]
    assert all(sorted(order) == list(range(8)) for order in hu)
    assert len({tuple(order) for order in hu}) == 5


def test_another_seed_changes_windows_but_not_the_mixture(manifest, sampler):
    other = ReplaySampler(manifest, seq_length=S, seed=12, mixture=MIXTURE).picks(0, 200)
    same = sampler.picks(0, 200)
    np.testing.assert_array_equal(other[:, 0], same[:, 0])
    assert (other[:, 1] != same[:, 1]).any()


def test_a_new_corpus_leaves_the_others_order_alone(make_manifest):
    corpora = [("hu", "hu", "expanded", 1, 500), ("en", "en", "original", 1, 500)]
    before = ReplaySampler(make_manifest(*corpora), seq_length=S, seed=1, mixture=MIXTURE)
    corpora.append(("tr", "tr", "expanded", 1, 500))
    after = ReplaySampler(make_manifest(*corpora), seq_length=S, seed=1, mixture=MIXTURE)
    windows = [
        [(w, e) for corpus, w, e in sampler.picks(0, 300).tolist() if corpus == 0][:80] for sampler in (before, after)
    ]
    assert len(windows[0]) == 80 and windows[0] == windows[1]


def test_batches_do_not_depend_on_how_they_are_cut(sampler):
    whole = sampler.fill(0, 48)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda first: sampler.fill(first, 3), range(0, 48, 3)))
    np.testing.assert_array_equal(np.concatenate([part.tokens_BS for part in parts]), whole.tokens_BS)
    np.testing.assert_array_equal(np.concatenate([part.tags_BS for part in parts]), whole.tags_BS)


def test_fill_writes_into_the_given_buffers(sampler):
    out = Batch.empty(4, S)
    assert sampler.fill(7, 4, out) is out
    np.testing.assert_array_equal(out.labels_BS, sampler.fill(7, 4).labels_BS)


def test_fill_refuses_buffers_of_another_shape_or_type(sampler):
    with pytest.raises(ValueError, match="shape"):
        sampler.fill(0, 4, Batch.empty(5, S))
    good = Batch.empty(4, S)
    with pytest.raises(TypeError):
        sampler.fill(0, 4, dataclasses.replace(good, tokens_BS=good.tokens_BS.astype(np.int32)))


@pytest.mark.parametrize("first, count", [(0, 1), (0, 128), (1000, 77)])
def test_counts_equal_the_filled_masks(sampler, first, count):
    batch, counts = sampler.fill(first, count), sampler.count(first, count)
    assert counts.tokens == batch.loss_mask_BS.sum()
    assert counts.original_tokens == (batch.tags_BS > 0).sum()
    by_tag = {"hu": -1, "en": 2, "tr": -3}
    assert counts.tokens_per_language == {language: (batch.tags_BS == tag).sum() for language, tag in by_tag.items()}


@pytest.mark.parametrize("dtype, code", [(np.uint8, 1), (np.int16, 3), (np.int32, 4), (np.int64, 5), (np.uint16, 8)])
def test_reads_every_integer_type(make_manifest, tmp_path, dtype, code):
    manifest = make_manifest(("hu", "hu", "expanded", 1, 100))
    tokens = np.arange(100).astype(dtype)
    tokens.tofile(tmp_path / "hu.bin")
    index = bytearray((tmp_path / "hu.idx").read_bytes())
    index[17] = code
    (tmp_path / "hu.idx").write_bytes(index)
    sampler = ReplaySampler(manifest, seq_length=99, seed=0, mixture={"expanded": 1})
    np.testing.assert_array_equal(sampler.fill(0, 1).labels_BS[0], np.arange(1, 100))
    np.testing.assert_array_equal(IndexedCorpus(str(tmp_path / "hu")).document(0), tokens)


def test_a_window_of_more_tokens_than_are_read_at_once(make_manifest):
    manifest = make_manifest(("hu", "hu", "expanded", 1, 20_000))
    batch = ReplaySampler(manifest, seq_length=19_999, seed=0, mixture={"expanded": 1}).fill(0, 1)
    tokens = IndexedCorpus(manifest.corpora[0].prefix).document(0)
    np.testing.assert_array_equal(batch.tokens_BS[0], tokens[:-1])
    np.testing.assert_array_equal(batch.labels_BS[0], tokens[1:])


def test_state_is_plain_and_accepted(sampler):
    state = json.loads(json.dumps(sampler.state(640)))
    assert state["consumed_samples"] == 640
    sampler.check_state(state)


def test_state_names_what_changed(manifest, sampler):
    state = json.loads(json.dumps(sampler.state(640)))

    def refused(message: str, new_manifest: Manifest = manifest, **arguments):
        settings = {"seq_length": S, "seed": 11, "mixture": MIXTURE} | arguments
        with pytest.raises(UserError, match=message):
            ReplaySampler(new_manifest, **settings).check_state(state)

    refused("seed was 11, is 12", seed=12)
    refused("seq_length was 16, is 8", seq_length=8)
    refused("windows was packed, is document", windows="document")
    refused("tokens_read of corpus 'en_help' was None, is 24", replay=ReplayConfig(tokens={"en": 0.5}))
    refused("share of corpus 'hu' from sample 0 on was 2/5, is 1/3", mixture={"expanded": 0.5, "original": 0.5})
    refused(r"took over at samples \[0\], now at \[0, 600\]", schedule=[ScheduleEntry(from_sample=600)])

    hu, *rest = manifest.corpora
    changed = dataclasses.replace
    refused("share of corpus 'hu' .* was 2/5, is 9/20", changed(manifest, corpora=(changed(hu, weight=3), *rest)))
    refused("digest of corpus 'hu'", changed(manifest, corpora=(changed(hu, digest="f" * 64), *rest)))
    refused("share of corpus 'hu' .* is 0", changed(manifest, corpora=tuple(rest)))
    added = changed(manifest, corpora=(*manifest.corpora, changed(hu, name="hu2")))
    refused("share of corpus 'hu2' from sample 0 on was 0, is 6/25", added)
    refused("order of the corpora", changed(manifest, corpora=(*rest, hu)))
    tokenizer = changed(manifest.tokenizer, sha256="1" * 64)
    refused("tokenizer was 000", changed(manifest, tokenizer=tokenizer))
    refused("eod_id was 2, is 3", changed(manifest, tokenizer=changed(manifest.tokenizer, eod_id=3)))


def test_a_run_in_another_order_is_not_resumed(sampler):
    state = sampler.state(640) | {"version": 2}
    message = r"^the run began with another version of megatron_lpr, .* \(version 2 of the data's state, here it is 3\)"
    with pytest.raises(UserError, match=message):
        sampler.check_state(state)


def test_what_has_not_been_read_may_change(manifest, sampler):
    """Mixtures that take over later, and corpora that only those read; what went before stays the same."""
    state = sampler.state(640)
    tr2 = dataclasses.replace(manifest.corpora[2], name="tr2", digest="e" * 64)
    extended = dataclasses.replace(manifest, corpora=(*manifest.corpora, tr2))
    settings = {"seq_length": S, "seed": 11, "mixture": MIXTURE}
    schedule = [ScheduleEntry(from_sample=0, weights={"tr2": 0}), ScheduleEntry(from_sample=640, weights={"tr2": 2})]
    later = ReplaySampler(extended, **settings, schedule=schedule)
    later.check_state(state)
    np.testing.assert_array_equal(later.picks(0, 640), sampler.picks(0, 640))
    assert (later.picks(640, 50)[:, 0] == 4).any()
    # and the mixture that was to follow may be taken back as long as it has not begun
    sampler.check_state(later.state(640))
    with pytest.raises(UserError, match="took over at samples"):
        sampler.check_state(later.state(641))


def test_moving_the_folder_changes_nothing(manifest, sampler, tmp_path):
    moved = dataclasses.replace(manifest, path=str(tmp_path / "elsewhere.yaml"))
    ReplaySampler(moved, seq_length=S, seed=11, mixture=MIXTURE).check_state(sampler.state(3))


@pytest.mark.parametrize("arguments, message", [({"seq_length": 0}, "seq_length"), ({"seed": -1}, "seed")])
def test_bad_arguments(manifest, arguments, message):
    with pytest.raises(UserError, match=message):
        ReplaySampler(manifest, **({"seq_length": S, "seed": 1, "mixture": MIXTURE} | arguments))


def test_a_corpus_of_one_token_has_no_window(make_manifest):
    manifest = make_manifest(("hu", "hu", "expanded", 1, 1))
    with pytest.raises(UserError, match="hu.bin holds fewer than two tokens"):
        ReplaySampler(manifest, seq_length=S, seed=1, mixture={"expanded": 1})
