"""Indexed corpora: written and read back, exchanged with Megatron-Core, refused where corrupt."""

import hashlib
import os
import struct
import time

import numpy as np
import pytest

from megatron_lpr._replay_sampler import Index
from megatron_lpr.data.corpus.indexed import IndexedCorpus, IndexedWriter
from megatron_lpr.errors import UserError

DOCUMENTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("vocab_size, dtype", [(65499, np.uint16), (65500, np.int32)])
def test_round_trip(write_corpus, vocab_size, dtype):
    corpus = IndexedCorpus(write_corpus("toy", DOCUMENTS, vocab_size))
    assert (len(corpus), corpus.num_tokens, corpus.tokens.dtype) == (3, 12, dtype)
    assert [corpus.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert corpus.tokens[:].tolist() == sum(DOCUMENTS, [])


def test_more_documents_than_one_chunk_of_the_index(write_corpus):
    documents = [[i % 7] * (1 + i % 3) for i in range(70_000)]
    corpus = IndexedCorpus(write_corpus("toy", documents))
    for index in (0, 65_535, 65_536, 65_537, 69_999):
        assert corpus.document(index).tolist() == documents[index]


def test_digest_is_that_of_the_bin_file(tmp_path):
    writer = IndexedWriter(str(tmp_path / "toy"), 100)
    writer.add_documents(np.array([1, 2, 3], writer.dtype), np.array([3], np.int32))
    writer.close()
    assert writer.digest == hashlib.sha256((tmp_path / "toy.bin").read_bytes()).hexdigest()


def test_files_appear_only_when_complete(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(str(tmp_path / "toy"), 100) as writer:
        writer.add_documents(np.array([1, 2, 3], writer.dtype), np.array([3], np.int32))
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_refuses_to_write_nothing(tmp_path):
    with (
        pytest.raises(UserError, match="toy: the corpus is empty"),
        IndexedWriter(str(tmp_path / "toy"), 100),
    ):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("tokens, lengths", [([], [0]), ([1, 2], [2, 0]), ([1, 2], [1])])
def test_refuses_impossible_documents(tmp_path, tokens, lengths):
    writer = IndexedWriter(str(tmp_path / "toy"), 100)
    with pytest.raises(AssertionError):
        writer.add_documents(np.array(tokens, writer.dtype), np.array(lengths, np.int32))
    writer.discard()


@pytest.mark.megatron
@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_megatron_reads_what_we_write(write_corpus, vocab_size):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = indexed_dataset.IndexedDataset(write_corpus("toy", DOCUMENTS, vocab_size))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.megatron
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tmp_path, dtype):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prefix = str(tmp_path / "megatron")
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    # The second document has two sequences, as Megatron's sentence-split corpora do.
    builder.add_document(np.array(DOCUMENTS[0]), [3])
    builder.add_document(np.array(DOCUMENTS[1] + DOCUMENTS[2]), [1, 8])
    builder.finalize(f"{prefix}.idx")
    corpus = IndexedCorpus(prefix)
    assert [corpus.document(i).tolist() for i in range(len(corpus))] == [
        DOCUMENTS[0],
        DOCUMENTS[1] + DOCUMENTS[2],
    ]
    index = Index(prefix)
    code = 8 if dtype is np.uint16 else 4
    assert (index.dtype_code, index.sequences, index.documents, index.tokens) == (code, 3, 2, 12)


def patch(path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


# Index of DOCUMENTS: header [0, 34), lengths [34, 46), offsets [46, 70), document index [70, 102).
@pytest.mark.parametrize(
    "suffix, damage, message",
    [
        (".idx", lambda path: os.remove(path), "cannot open .*toy.idx"),
        (".idx", lambda path: os.truncate(path, 0), "toy.idx is empty"),
        (".idx", lambda path: os.truncate(path, 20), "toy.idx is truncated"),
        (".idx", lambda path: os.truncate(path, 90), "toy.idx has the wrong size"),
        (".idx", lambda path: patch(path, 0, b"X"), "toy.idx is not a Megatron index"),
        (".idx", lambda path: patch(path, 9, b"\x02"), "toy.idx has an unsupported index version"),
        (".idx", lambda path: patch(path, 17, b"\x02"), "toy.idx holds no integer tokens"),
        (".idx", lambda path: patch(path, 17, b"\x07"), "toy.idx holds no integer tokens"),
        (".idx", lambda path: patch(path, 17, b"\x63"), "toy.idx holds no integer tokens"),
        (".idx", lambda path: patch(path, 18, struct.pack("<Q", 2**62 + 3)), "toy.idx has the wrong size"),
        (".idx", lambda path: patch(path, 18, struct.pack("<Q", 102 - 34)), "toy.idx has the wrong size"),
        (".idx", lambda path: patch(path, 26, struct.pack("<Q", 2**61 + 4)), "toy.idx has the wrong size"),
        (".idx", lambda path: patch(path, 18, struct.pack("<Q", 0)), "toy.idx describes an empty corpus"),
        (".idx", lambda path: patch(path, 26, struct.pack("<Q", 1)), "toy.idx describes an empty corpus"),
        (".idx", lambda path: patch(path, 46, struct.pack("<q", 2)), "toy.idx is corrupt: its first sequence"),
        (".idx", lambda path: patch(path, 70, struct.pack("<q", 1)), "toy.idx is corrupt"),
        (".idx", lambda path: patch(path, 94, struct.pack("<q", 9)), "toy.idx is corrupt"),
        (".idx", lambda path: patch(path, 42, struct.pack("<i", -8)), "toy.bin does not end where"),
        (".idx", lambda path: patch(path, 62, struct.pack("<q", 2**62)), "toy.bin does not end where"),
        (
            ".idx",
            lambda path: patch(path, 42, struct.pack("<i", 20)) or patch(path, 62, struct.pack("<q", 24 - 40)),
            "toy.bin does not end where",
        ),
        (".bin", lambda path: os.remove(path), "cannot open .*toy.bin"),
        (".bin", lambda path: os.truncate(path, 0), "toy.bin is empty"),
        (".bin", lambda path: os.truncate(path, 23), "toy.bin is truncated"),
        (".bin", lambda path: os.truncate(path, 22), "toy.bin does not end where"),
    ],
)
def test_corrupt_files_are_refused_by_name(write_corpus, suffix, damage, message):
    prefix = write_corpus("toy", DOCUMENTS)
    damage(prefix + suffix)
    with pytest.raises(UserError, match=message):
        IndexedCorpus(prefix)


def test_a_document_outside_the_tokens_is_refused(write_corpus):
    prefix = write_corpus("toy", DOCUMENTS)
    patch(f"{prefix}.idx", 54, struct.pack("<q", 2**40))
    with pytest.raises(UserError, match="toy.idx is corrupt: document 1"):
        IndexedCorpus(prefix).document(1)
    patch(f"{prefix}.idx", 78, struct.pack("<q", 2**40))
    with pytest.raises(UserError, match="toy.idx is corrupt: document 0"):
        IndexedCorpus(prefix).document(0)


@pytest.mark.parametrize(
    "offset, data",
    [
        (34, struct.pack("<i", -3)),  # a negative length
        (34, struct.pack("<i", 4)),  # lengths that are not those between the offsets
        (54, struct.pack("<q", 7)),  # an offset inside a token
        (54, struct.pack("<q", -6)),
        (78, struct.pack("<q", -1)),  # a document index that is negative, or goes back
        (78, struct.pack("<q", 3)),
    ],
)
def test_a_corrupt_index_is_refused_where_it_is_read(write_corpus, offset, data):
    prefix = write_corpus("toy", DOCUMENTS)
    patch(f"{prefix}.idx", offset, data)
    corpus = IndexedCorpus(prefix)
    with pytest.raises(UserError, match="toy.idx is corrupt: document"):
        corpus.boundaries(0, 3)
    for index in range(3):
        try:
            corpus.document(index)
        except UserError:
            continue


def test_a_multimodal_index_is_read(write_corpus):
    prefix = write_corpus("toy", DOCUMENTS)
    with open(f"{prefix}.idx", "ab") as file:
        file.write(bytes(len(DOCUMENTS)))  # the mode of each sequence
    assert IndexedCorpus(prefix).document(1).tolist() == DOCUMENTS[1]


def test_boundaries(write_corpus):
    corpus = IndexedCorpus(write_corpus("toy", DOCUMENTS))
    assert corpus.boundaries(0, 3).tolist() == [0, 3, 4, 12] and corpus.boundaries(1, 1).tolist() == [3, 4]


def test_opening_reads_no_documents(tmp_path):
    """A corpus of 2^30 documents, all holes but for the ends."""
    documents = 1 << 30
    with open(tmp_path / "huge.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        for offset, data in (
            (34 + 4 * (documents - 1), struct.pack("<i", 2)),
            (34 + 4 * documents + 8 * (documents - 1), struct.pack("<q", 2 * (2 * documents - 2))),
            (34 + 12 * documents + 8 * (documents - 1), struct.pack("<qq", documents - 1, documents)),
        ):
            file.seek(offset)
            file.write(data)
    with open(tmp_path / "huge.bin", "wb") as file:
        file.truncate(4 * documents)
    start = time.process_time()
    corpus = IndexedCorpus(str(tmp_path / "huge"))
    assert time.process_time() - start < 3  # reading 20 GB takes longer
    assert (len(corpus), corpus.num_tokens) == (documents, 2 * documents)
    assert corpus.boundaries(documents - 1, 1).tolist() == [2 * documents - 2, 2 * documents]
