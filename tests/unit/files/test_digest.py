"""The SHA-256 of a file."""

import hashlib

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.files import digest
from megatron_lpr.files.digest import file_sha256


def test_it_is_hashlibs_and_tells_its_progress(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for content in (b"", b"a", bytes(range(256)) * 5):
        path.write_bytes(content)
        monkeypatch.setattr(digest, "_CHUNK_BYTES", 512)
        read: list[int] = []
        assert file_sha256(path, read.append) == file_sha256(str(path)) == hashlib.sha256(content).hexdigest()
        assert sum(read) == len(content) and len(read) == -(-len(content) // 512)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere: No such file"):
        file_sha256(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot read .*: Is a directory"):
        file_sha256(tmp_path)
