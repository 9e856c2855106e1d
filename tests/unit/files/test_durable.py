"""Small files that are replaced whole, or not at all, by several processes too."""

import errno
import os
import subprocess
import sys

import pytest

from megatron_lpr.files import durable

_WRITES = """
import os
import sys
from pathlib import Path
from megatron_lpr.files import durable
os.getpid = lambda: 1  # as in two containers
for number in range(150):
    durable.write_text(Path(sys.argv[1]), sys.argv[2] * 200_000)
"""


def test_of_two_that_write_one_file_at_once_each_writes_it_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("a" * 200_000)
    writers = [subprocess.Popen([sys.executable, "-c", _WRITES, str(path), letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        text = path.read_text()
        assert text in ("a" * 200_000, "b" * 200_000)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    file.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*result.json"):
        durable.write_text(file, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"result.json": "old"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    durable.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_what_is_no_file_is_written_to(tmp_path):
    """--out /dev/null, by root, is not to replace the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    durable.write_text(pipe, "new")
    assert os.read(reader, 10) == b"new" and pipe.is_fifo()
    os.close(reader)
