"""The language sidecar: written in pieces, read anywhere, refused where corrupt."""

import hashlib
import os
import struct

import numpy as np
import pytest

from megatron_lpr._replay_sampler import LanguageRuns
from megatron_lpr.data.corpus.indexed import LanguageRunsWriter
from megatron_lpr.errors import UserError

TAGS = np.array([1, 1, 0, 0, 0, 2, 1, 1, 1, 1], np.uint16)


@pytest.fixture
def prefix(tmp_path) -> str:
    """Sidecar of TAGS, whose runs start at 0, 2, 5, 6."""
    writer = LanguageRunsWriter(str(tmp_path / "toy"))
    for first, end in ((0, 1), (1, 4), (4, 8), (8, 10)):  # pieces that cut runs, and one that does not
        writer.add(TAGS[first:end])
    writer.close()
    assert writer.digest == hashlib.sha256((tmp_path / "toy.lang").read_bytes()).hexdigest()
    return str(tmp_path / "toy")


def test_the_agreed_bytes(prefix, tmp_path):
    expected = struct.pack("<8sQ4Q4H", b"LPRLANG1", 4, 0, 2, 5, 6, 1, 0, 2, 1)
    assert (tmp_path / "toy.lang").read_bytes() == expected
    assert os.listdir(tmp_path) == ["toy.lang"]


def test_read_anywhere(prefix):
    runs = LanguageRuns(prefix, num_tokens=10, num_languages=3)
    runs.check()
    for first in range(10):
        for count in range(1, 11 - first):
            assert runs.of_tokens(first, count).tolist() == TAGS[first : first + count].tolist()
    for first, count in ((9, 2), (11, 1), (2**64 - 1, 2)):
        with pytest.raises(IndexError, match="past the end of the corpus"):
            runs.of_tokens(first, count)


def patch(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


# Header [0, 16), firsts [16, 48), languages [48, 56).
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: os.remove(path), "cannot open .*toy.lang"),
        (lambda path: os.truncate(path, 0), "toy.lang is empty"),
        (lambda path: patch(path, 0, b"X"), "toy.lang is not a language sidecar"),
        (lambda path: os.truncate(path, 15), "toy.lang is not a language sidecar"),
        (lambda path: os.truncate(path, 55), "toy.lang has the wrong size"),
        (lambda path: patch(path, 8, struct.pack("<Q", 2**63 + 4)), "toy.lang has the wrong size"),
        (lambda path: patch(path, 8, bytes(8)) or os.truncate(path, 16), "toy.lang has the wrong size"),
        (lambda path: patch(path, 16, struct.pack("<Q", 1)), "toy.lang is corrupt"),
        (lambda path: patch(path, 40, struct.pack("<Q", 10)), "toy.lang is corrupt"),
    ],
)
def test_corrupt_files_are_refused_when_opened(prefix, damage, message):
    damage(f"{prefix}.lang")
    with pytest.raises(UserError, match=message):
        LanguageRuns(prefix, num_tokens=10, num_languages=3)


@pytest.mark.parametrize(
    "offset, data",
    [(24, struct.pack("<Q", 6)), (24, struct.pack("<Q", 2**63)), (32, struct.pack("<Q", 2)), (52, b"\x03\x00")],
)
def test_corrupt_runs_are_refused_where_they_are_read(prefix, offset, data):
    patch(f"{prefix}.lang", offset, data)
    runs = LanguageRuns(prefix, num_tokens=10, num_languages=3)
    with pytest.raises(UserError, match="toy.lang is corrupt"):
        runs.check()
    with pytest.raises(UserError, match="toy.lang is corrupt"):
        runs.of_tokens(0, 10)
    for first in range(10):  # wrong or refused, never a crash
        for count in range(1, 11 - first):
            try:
                assert len(runs.of_tokens(first, count)) == count
            except UserError:
                pass


def test_discard_leaves_nothing(tmp_path):
    writer = LanguageRunsWriter(str(tmp_path / "toy"))
    writer.add(TAGS)
    writer.discard()
    assert os.listdir(tmp_path) == []
