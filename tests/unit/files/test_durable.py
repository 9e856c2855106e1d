"""Small files that several processes replace and read."""

import subprocess
import sys

_WRITES = """
import sys
from pathlib import Path
from megatron_lpr.files import durable
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
