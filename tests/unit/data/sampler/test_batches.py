"""The same ordered global batches whatever the split over ranks and micro-batches, and wherever a run stops."""

import dataclasses
import gc
import hashlib
import itertools
import os
import time

import numpy as np
import pytest

from megatron_lpr.data.sampler.batches import MicroBatches, RankLayout
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import ScheduleEntry

S, GLOBAL, STEPS = 8, 96, 3


@pytest.fixture
def sampler(make_manifest) -> ReplaySampler:
    manifest = make_manifest(
        ("hu", "hu", "expanded", 2, 700), ("tr", "tr", "expanded", 0.3, 90), ("en", "en", "original", 1, 333)
    )
    schedule = [ScheduleEntry(from_sample=100, mixture={"expanded": 0.2, "original": 0.8})]
    return ReplaySampler(
        manifest, seq_length=S, seed=5, mixture={"expanded": 0.9, "original": 0.1}, schedule=schedule, document_ids=True
    )


def rank_steps(sampler, layout: RankLayout, steps: range, read_ahead: int) -> list[list[np.ndarray]]:
    """One rank's rows, per step and micro-batch: all fields side by side."""
    reader = MicroBatches(sampler, layout, consumed_samples=steps.start * GLOBAL, read_ahead=read_ahead)
    return [
        [
            np.concatenate([getattr(batch, name) for name in vars(batch)], axis=1)
            for (batch,) in zip(*reader.step(GLOBAL), strict=True)
        ]
        for _ in steps
    ]


def step_hashes(sampler, dp: int, micro: int, steps: range, read_ahead: int = 0) -> list[str]:
    """Of each step's global batch in order: micro-batch by micro-batch, rank by rank."""
    ranks = [
        rank_steps(
            sampler,
            RankLayout(micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=dp),
            steps,
            read_ahead,
        )
        for rank in range(dp)
    ]
    return [
        hashlib.sha256(b"".join(part.tobytes() for parts in zip(*step, strict=True) for part in parts)).hexdigest()
        for step in zip(*ranks, strict=True)
    ]


@pytest.fixture
def expected(sampler) -> list[str]:
    whole = [sampler.fill(step * GLOBAL, GLOBAL) for step in range(STEPS)]
    rows = [np.concatenate([getattr(batch, name) for name in vars(batch)], axis=1) for batch in whole]
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]


@pytest.mark.parametrize("dp, micro", list(itertools.product([1, 2, 3, 4, 6, 8], [1, 2, 4])))
def test_identical_global_batches_at_every_layout(sampler, expected, dp, micro):
    assert step_hashes(sampler, dp, micro, range(STEPS), read_ahead=dp % 3) == expected


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_identical_batches_after_a_resume_at_another_layout(sampler, expected, stop):
    before = step_hashes(sampler, 4, 2, range(stop))
    state = sampler.state(stop * GLOBAL)
    sampler.check_state(state)
    first = state["consumed_samples"] // GLOBAL
    assert before + step_hashes(sampler, 3, 4, range(first, STEPS), read_ahead=3) == expected


def test_extending_a_run_keeps_the_whole_order(sampler, expected):
    """Nothing in the sampler knows how long the run is; 3 epochs in, the order so far is what it was."""
    long = step_hashes(sampler, 2, 4, range(20))
    assert long[:STEPS] == expected and len(set(long)) == 20


def test_model_chunks_share_the_micro_batches(sampler):
    reader = MicroBatches(sampler, RankLayout(micro_batch_size=32), consumed_samples=0)
    first, second = reader.step(GLOBAL, num_chunks=2)
    pairs = list(zip(first, second, strict=True))
    assert len(pairs) == 3 and all(one is other for one, other in pairs)
    np.testing.assert_array_equal(next(reader.step(GLOBAL)[0]).tokens_BS, sampler.fill(GLOBAL, 32).tokens_BS)


def test_context_parallel_ranks_share_every_sample(sampler):
    parts = []
    for rank in range(2):
        layout = RankLayout(micro_batch_size=2, context_parallel_rank=rank, context_parallel_size=2)
        parts.append(next(MicroBatches(sampler, layout, consumed_samples=7).step(2)[0]))
    whole = sampler.fill(7, 2)
    np.testing.assert_array_equal(parts[0].tags_BS, whole.tags_BS[:, [0, 1, 6, 7]])
    np.testing.assert_array_equal(parts[1].labels_BS, whole.labels_BS[:, [2, 3, 4, 5]])
    for part in parts:
        np.testing.assert_array_equal(part.documents_BS, whole.documents_BS)


@pytest.mark.parametrize("read_ahead", [1, 2, 7])
def test_read_ahead_changes_nothing(sampler, read_ahead):
    pairs = zip(sampler.batches(11, 5, 20, read_ahead=read_ahead), sampler.batches(11, 5, 20), strict=False)
    for ahead, read in itertools.islice(pairs, 40):
        for name, array in vars(read).items():
            np.testing.assert_array_equal(getattr(ahead, name), array)


def test_batches_outlive_the_thread_that_read_them(sampler):
    reader = sampler.batches(0, 4, 4, read_ahead=2)
    batch = next(reader)
    del reader
    gc.collect()
    np.testing.assert_array_equal(batch.tokens_BS, sampler.fill(0, 4).tokens_BS)


def test_buffers_are_used_again_only_when_nobody_reads_them(sampler):
    reader = sampler.batches(0, 4, 4, read_ahead=2)
    kept = [next(reader) for _ in range(20)]
    labels = [next(reader).labels_BS for _ in range(20)]  # one field of a batch keeps the batch
    places = set()
    for _ in range(60):
        places.add(next(reader).tokens_BS.__array_interface__["data"][0])
    assert len(places) < 10
    for i, batch in enumerate(kept):
        for name, array in vars(sampler.fill(4 * i, 4)).items():
            np.testing.assert_array_equal(getattr(batch, name), array)
    for i, array in enumerate(labels, start=20):
        np.testing.assert_array_equal(array, sampler.fill(4 * i, 4).labels_BS)


def test_threads_end_with_their_reader(sampler):
    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    before = threads()
    readers = [sampler.batches(0, 4, 4, read_ahead=3) for _ in range(5)]
    for reader in readers:
        next(reader)
    mine = threads() - before
    assert len(mine) == 5
    del reader, readers
    gc.collect()
    for _ in range(1000):  # one that has been joined is there for a moment more
        if not mine & threads():
            return
        time.sleep(0.01)
    raise AssertionError(mine)


def test_what_goes_wrong_is_raised_where_it_is_read(make_manifest):
    """A corrupt run in the middle of the sidecar: batches before it are read, the one that meets it raises."""
    manifest = make_manifest(("hu", "hu", "expanded", 1, 81))
    # language 1 is none of the entry's; positions from 49 on lie in windows 6 to 9
    runs = b"LPRLANG1" + np.array([2, 0, 49], np.uint64).tobytes() + np.array([0, 1], np.uint16).tobytes()
    with open(f"{manifest.corpora[0].prefix}.lang", "wb") as file:
        file.write(runs)
    mixed = dataclasses.replace(manifest.corpora[0], languages={"hu": "expanded"}, language_digest="a" * 64)
    sampler = ReplaySampler(manifest.with_corpora([mixed]), seq_length=8, seed=1, mixture={"expanded": 1})
    bad = min(place for place, window in enumerate(sampler.picks(0, 10)[:, 1].tolist()) if window >= 6)
    reader = sampler.batches(0, 1, 1, read_ahead=10)
    for _ in range(bad):
        next(reader)
    with pytest.raises(UserError, match="hu.lang is corrupt at run 1"):
        next(reader)
